"""Key-value cache of a causal decoder (Pope et al., 2022, 2211.05102).

The keys and values of past tokens never change. A cache keeps them, so that of a new
token only its own have to be computed.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kv_cache_bytes(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    seq_len: int,
    batch_size: int = 1,
    bytes_per_element: int = 2,
) -> int:
    """Computes the bytes of all keys and values.

    Args:
        num_layers: attention layers, each with a cache of its own.
        num_kv_heads: heads of keys and values. Grouped-query attention (Ainslie et
            al., 2023, 2305.13245) has fewer than query heads, multi-query attention
            (Shazeer, 2019, 1911.02150) one.
        head_dim: features of a key and of a value, d_k.
        seq_len: tokens in the cache.
        batch_size: sequences.
        bytes_per_element: 2 for float16 and bfloat16.

    Raises:
        ValueError: a number is below 1.
    """
    numbers = dict(locals())
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    return 2 * math.prod(numbers.values())


class KVCache:
    """The keys and values of one attention layer, of all tokens so far.

    Args:
        max_length: tokens for which the first update sets one buffer aside; updates
            write into it, and record no gradients. None: each update copies the cache
            into a longer one, and gradients flow back to every token.

    Attributes:
        keys, values: (B, H, T, d_k) with H key-value heads, views; None before the
            first update.

    Raises:
        ValueError: max_length is below 1.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._buffer: Tensor | None = None  # (2, B, H, T or max_length, d_k)

    def __len__(self) -> int:
        """Tokens in the cache."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held: with max_length, of the whole buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens.

        Args:
            key: (B, H, new tokens, d_k).
            value: likewise.

        Returns:
            the keys and the values of all tokens, (B, H, T, d_k) each.

        Raises:
            ValueError: shapes do not fit, or max_length is too small.
            TypeError: dtype or device differ.
            RuntimeError: gradients would be recorded in spite of max_length.
            The cache is then as it was.
        """
        like = key if self.keys is None else self.keys
        shape = like.shape[:2] + key.shape[2:3] + like.shape[3:]
        for name, x in (("key", key), ("value", value)):
            if x.dim() != 4 or x.shape != shape:
                expected = f"(B, H, T, d_k) = {tuple(shape)}"
                raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)}")
            if (x.dtype, x.device) != (like.dtype, like.device):
                expected = f"{like.dtype} on {like.device}"
                raise TypeError(
                    f"{name} must be {expected}, got {x.dtype} on {x.device}"
                )
        start, end = len(self), len(self) + shape[2]
        new = torch.stack((key, value))  # (2, B, H, new tokens, d_k)
        if self.max_length is None:
            past = new if self._buffer is None else self._buffer
            self._buffer = torch.cat((past[..., :start, :], new), dim=-2)
        elif end > self.max_length:
            raise ValueError(
                f"max_length must be at least {end}, got {self.max_length}"
            )
        elif new.requires_grad:
            raise RuntimeError("max_length must be None where gradients are recorded")
        else:
            if self._buffer is None:
                self._buffer = new.new_empty(2, *shape[:2], self.max_length, shape[3])
            self._buffer[..., start:end, :] = new
        self.keys, self.values = self._buffer[..., :end, :]
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Forgets all but the first tokens; the next update frees their memory.

        Raises:
            ValueError: length is not in 0..len(cache).
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"length must be in 0..{len(self)}, got {length}")
        if length < len(self):
            self.keys, self.values = self._buffer[..., :length, :]


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

    def new_caches(self) -> list[KVCache]:
        """An empty cache for each block."""
        return [KVCache() for _ in self.blocks]

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
    model: DecoderLM,
    ids: Tensor,
    max_new_tokens: int,
    use_cache: bool = True,
    caches: list[Any] | None = None,
) -> Tensor:
    """Continues ids (B, T) greedily: (B, T + max_new_tokens); of equals the first.

    Args:
        model: in the mode it is in.
        ids: the prompt, T >= 1.
        max_new_tokens: may be 0.
        use_cache: read the prompt once and then a token at a time, or all each time.
        caches: filled if given; by default new ones.

    Raises:
        ValueError: max_new_tokens is negative, or as the model does.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if use_cache and caches is None:
        caches = model.new_caches()
    new = ids
    for _ in range(max_new_tokens):
        logits = model(new, caches) if use_cache else model(ids)
        new = logits[:, -1:].argmax(dim=-1)  # (B, 1)
        ids = torch.cat((ids, new), dim=1)
    return ids
