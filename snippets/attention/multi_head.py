"""Multi-head attention (Vaswani et al., 2017, section 3.2.2).

Several attentions run side by side, each on its own projection of the tokens; the
output projection mixes what they found.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_H) W^O with head_i = Attention(Q W_i, K W_i, V W_i).

    Parameters and initialization are those of `nn.MultiheadAttention`; a `state_dict`
    of one loads into the other. Bool masks are the opposite: True is "may attend".

    Args:
        embed_dim: features of a token, d_model.
        num_heads: number of heads, H; each has d_k = d_model / H features.
        bias: whether the projections add a bias.

    Raises:
        ValueError: embed_dim is not a positive multiple of num_heads.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, section 3.2.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            multiple = f"a positive multiple of {num_heads=}"
            raise ValueError(f"{embed_dim=} must be {multiple}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        # The W_i of all heads for Q, then K, then V: one matrix, one initialization.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends with every head, then mixes the heads.

        Args:
            query: (B, L, d_model).
            key: (B, S, d_model), query by default.
            value: (B, S, d_model), key by default.
            attn_mask: (L, S), or 4-D (B, H, L, S) where sizes may be 1. Bool: True
                where a query may attend; padding `valid` (B, S) enters as
                `valid[:, None, None]`. Float: added to the scores.
            is_causal: query i sees keys 0..i, aligned top left.
            need_weights: also return the weights (B, H, L, S). Not by default, unlike
                torch's: `out, w = mha(x, x, x)` then unpacks a batch of two.

        Returns:
            (B, L, d_model), or the pair of it and the weights. The heads of a query
            that may attend to nothing are zero.

        Raises:
            ValueError: shapes do not fit, or attn_mask comes together with is_causal.
            TypeError: attn_mask is neither bool nor float.
        """
        q, k, v = self._project(query, key, value)
        heads = _attend(q, k, v, attn_mask, is_causal)  # (B, H, L, d_k)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, L, d_model)
        if not need_weights:
            return output
        # Attention to the rows of an identity matrix returns the weights themselves.
        identity = torch.eye(k.shape[2]).to(k).expand(*k.shape[:2], -1, -1)
        return output, _attend(q, k, identity, attn_mask, is_causal).contiguous()

    def heads(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns what each head found, (B, H, L, d_k). Arguments as in `forward`."""
        qkv = self._project(query, key, value)
        return _attend(*qkv, attn_mask, is_causal).contiguous()

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> list[Tensor]:
        key = query if key is None else key
        value = key if value is None else value
        inputs, bias = {"query": query, "key": key, "value": value}, self.in_proj_bias
        for name, x in inputs.items():
            if x.dim() != 3 or x.shape[::2] != (query.shape[0], self.embed_dim):
                expected = f"(B, length, {self.embed_dim}) with the B of query"
                raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)}")
        if value.shape[1] != (S := key.shape[1]):
            raise ValueError(f"value must be as long as key, {S}, got {value.shape[1]}")
        biases = [None, None, None] if bias is None else bias.chunk(3)
        # (B, L or S, d_model) each, then (B, H, L or S, d_k)
        qkv = map(F.linear, inputs.values(), self.in_proj_weight.chunk(3), biases)
        return [x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in qkv]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal=True, got both")
        if attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        elif attn_mask.dtype != torch.bool:
            raise TypeError(f"attn_mask must be bool or float, got {attn_mask.dtype}")
        got, full = tuple(attn_mask.shape), (*q.shape[:3], k.shape[2])  # (B, H, L, S)
        fits = len(got) in (2, 4)  # (B, L, S) would pass for (H, L, S) when B = H
        if not fits or any(got[i] not in (1, full[i]) for i in range(-len(got), 0)):
            expected = f"2-D or 4-D and broadcast to {full}"
            raise ValueError(f"attn_mask must be {expected}, got {got}")
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
