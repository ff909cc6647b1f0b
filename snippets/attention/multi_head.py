"""Multi-head attention (Vaswani et al., 2017, section 3.2.2).

Several attentions run side by side, each on its own projection of the tokens; the
output projection mixes what they found.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_H) W^O with head_i = Attention(Q W_i, K W_i, V W_i).

    Parameters and initialization are those of `nn.MultiheadAttention`, and a
    `state_dict` of one loads into the other. Bool masks are the opposite of its: here
    True means "may attend", as in `F.scaled_dot_product_attention`.

    Args:
        embed_dim: features of a token, E.
        num_heads: number of heads, H; each has head_dim = E / H features.
        bias: whether the projections add a bias.

    Raises:
        ValueError: embed_dim is not a positive multiple of num_heads.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, section 3.2.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{embed_dim=} must be a positive multiple of {num_heads=}"
            )
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
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends with every head, then mixes the heads.

        Args:
            query: (B, L, E).
            key: (B, S, E), query by default.
            value: (B, S, E), key by default.
            attn_mask: (L, S), or 4-D and broadcasting to (B, H, L, S). Bool: True where
                a query may attend. Float: added to the scores.
            is_causal: query i sees keys 0..i, aligned top left.
            need_weights: also return the weights of every head.

        Returns:
            (B, L, E), or the pair of it and the weights (B, H, L, S). The heads of a
            query that may attend to nothing are zero.

        Raises:
            ValueError: shapes do not fit, or attn_mask comes together with is_causal.
        """
        q, k, v = self._project(query, key, value)
        heads = _attend(q, k, v, attn_mask, is_causal)  # (B, H, L, E/H)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, L, E)
        if not need_weights:
            return output
        # Attention to the rows of an identity matrix returns the weights themselves.
        identity = torch.eye(k.shape[2]).to(k).expand(*k.shape[:2], -1, -1)
        return output, _attend(q, k, identity, attn_mask, is_causal)  # (B, H, L, S)

    def heads(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns what each head found, (B, H, L, E/H). Arguments as in `forward`."""
        return _attend(*self._project(query, key, value), attn_mask, is_causal)

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> list[Tensor]:
        key = query if key is None else key
        value = key if value is None else value
        E, H, bias = self.embed_dim, self.num_heads, self.in_proj_bias
        inputs = {"query": query, "key": key, "value": value}
        for name, x in inputs.items():
            if x.dim() != 3 or x.shape[::2] != (query.shape[0], E):
                raise ValueError(
                    f"{name} must be (B, length, {E}) with the B of query, "
                    f"got {tuple(x.shape)}"
                )
        S = key.shape[1]
        if value.shape[1] != S:
            raise ValueError(f"value must be as long as key, {S}, got {value.shape[1]}")
        weights = self.in_proj_weight.chunk(3)
        biases = [None, None, None] if bias is None else bias.chunk(3)
        qkv = map(F.linear, inputs.values(), weights, biases)  # (B, L or S, E)
        return [x.unflatten(2, (H, -1)).transpose(1, 2) for x in qkv]  # (B, H, ., E/H)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal=True, got both")
        got, full = tuple(attn_mask.shape), (*q.shape[:3], k.shape[2])  # (B, H, L, S)
        allowed = product(*({1, size} for size in full[-len(got) :]))
        # No 3-D masks: (B, L, S) would pass for (H, L, S) whenever B = H.
        if len(got) not in (2, 4) or got not in allowed:
            raise ValueError(
                f"attn_mask must be 2-D or 4-D and broadcast to {full}, got {got}"
            )
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
