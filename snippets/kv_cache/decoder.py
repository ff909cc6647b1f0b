"""A small decoder-only language model (MosaicML's MPT, 2023; Press et al., 2022).

Pre-norm blocks without biases, tied logits; ALiBi tells the heads how far back a key
is. A cache is anything with a length and an `update`, such as `KVCache`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to those before it.

    Head h = 1..H adds -distance / 2^h to its scores (Press et al., 2022, 2108.12409:
    the slopes of eight heads, cut off). dim is a multiple of num_heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"{dim=} must be a positive multiple of {num_heads=}")
        self.dim, self.num_heads = dim, num_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)  # q, k, v
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """Attends from T new tokens to all S.

        Args:
            x: (B, T, dim) with T >= 1, the tokens after those in the cache.
            cache: `update` takes keys and values (B, H, T, d_k) and returns all.

        Returns (B, T, dim). ValueError: x has another shape.
        """
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (B, T >= 1, {self.dim}), got {tuple(x.shape)}")
        qkv = self.in_proj(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d_k)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, S, d_k)
        # The last query reads all S keys. is_causal=True would line the first query up
        # with the first key, and a single new token would read nothing else.
        positions = torch.arange(k.shape[2], device=x.device)
        ahead = positions - positions[-x.shape[1] :, None]  # (T, S), > 0 in the future
        slopes = 0.5 ** torch.arange(1, self.num_heads + 1, device=x.device)
        bias = (slopes[:, None, None] * ahead).masked_fill(ahead > 0, -torch.inf)
        heads = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, bias=False)
        self.self_attn = CausalSelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, bias=False)
        self.linear1 = nn.Linear(dim, 4 * dim, bias=False)
        self.linear2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        x = x + self.self_attn(self.norm1(x), cache)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class DecoderLM(nn.Module):
    """Embedding, blocks, a norm, and the embedding again for the logits.

    A text has at most max_length tokens. ValueError: a size is below 1, or dim is not
    a multiple of num_heads.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        max_length: int,
    ) -> None:
        super().__init__()
        if min(vocab_size, dim, num_layers, max_length) < 1:
            got = f"{vocab_size=}, {dim=}, {num_layers=}, {max_length=}"
            raise ValueError(f"sizes must be at least 1, got {got}")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # logits of variance 1

    def forward(self, ids: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Returns the logits (B, T, V) of what follows each of ids (B, T), T >= 1.

        The caches, one for each block, hold the tokens before these. ValueError: they
        are not that or differ in length, or the text is too long; nothing is cached.
        """
        start, n = 0, len(self.blocks)
        if caches is not None:
            lengths = [len(cache) for cache in caches]
            if len(set(map(id, caches))) != n or lengths != n * lengths[:1]:
                expected = f"{n} different ones of one length"
                raise ValueError(f"caches must be {expected}, got lengths {lengths}")
            start = lengths[0]
        if ids.dim() != 2 or not 0 < ids.shape[1] <= self.max_length - start:
            expected = f"(B, T) with T in 1..{self.max_length - start}"
            raise ValueError(f"ids must be {expected}, got {tuple(ids.shape)}")
        x = self.embedding(ids)  # (B, T, dim)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        return F.linear(self.norm(x), self.embedding.weight)


@torch.no_grad()
def generate(
    model: DecoderLM, ids: Tensor, max_new_tokens: int, caches: list[Any] | None = None
) -> Tensor:
    """Continues ids (B, T) with the likeliest tokens: (B, T + max_new_tokens).

    The first call fills caches with ids (prefill), each later one adds a token.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    new = ids
    for _ in range(max_new_tokens):
        logits = model(ids if caches is None else new, caches)
        new = logits[:, -1:].argmax(dim=-1)  # (B, 1)
        ids = torch.cat((ids, new), dim=1)
    return ids
