"""Transformer block (Vaswani et al., 2017, section 3.1; Xiong et al., 2020, figure 1).

Tokens exchange information in the attention and are transformed one by one in the
feed-forward network; a residual connection goes around each of the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """x + Sublayer(Norm(x)), for self-attention and then for the feed-forward network.

    Parameters and initialization are those of `nn.TransformerEncoderLayer`, and a
    `state_dict` of one loads into the other. There is no dropout.

    Args:
        d_model: features of a token.
        num_heads: number of attention heads, H; each has d_k = d_model / H features.
        d_ff: hidden features of the feed-forward network.
        norm_first: True normalizes what goes into each sub-layer (pre-norm, as in most
            language models since GPT-2). False normalizes each sum, as in 2017
            (post-norm): Norm(x + Sublayer(x)).

    Raises:
        ValueError: d_model is not a positive multiple of num_heads, or d_ff < 1.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, section 3.1;
        Xiong et al., 2020, "On Layer Normalization in the Transformer Architecture",
        2002.04745, figure 1.
    """

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, norm_first: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model < 1 or d_model % num_heads:
            raise ValueError(f"{d_model=} must be a positive multiple of {num_heads=}")
        if d_ff < 1:
            raise ValueError(f"d_ff must be at least 1, got {d_ff}")
        # Holds the projections; what it computes stands in _attention.
        self.self_attn = nn.MultiheadAttention(d_model, num_heads)
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm_first = norm_first

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Applies attention, then the feed-forward network.

        Args:
            x: (B, T, d_model).
            attn_mask: (T, T), or 4-D (B, H, T, T) where sizes may be 1. Bool: True
                where a token may attend, the opposite of `nn.TransformerEncoderLayer`;
                padding `valid` (B, T) enters as `valid[:, None, None]`. Float: added to
                the scores.

        Returns:
            (B, T, d_model). The attention of a token that may attend to nothing adds
            the bias of its output projection only.

        Raises:
            ValueError: the shape of x or attn_mask does not fit.
            TypeError: attn_mask is neither bool nor float.
        """
        d_model, num_heads = self.self_attn.embed_dim, self.self_attn.num_heads
        if x.dim() != 3 or x.shape[2] != d_model:
            raise ValueError(f"x must be (B, T, {d_model}), got {tuple(x.shape)}")
        if attn_mask is not None:
            if attn_mask.is_floating_point():
                attn_mask = attn_mask.to(x.dtype)
            elif attn_mask.dtype != torch.bool:
                raise TypeError(
                    f"attn_mask must be bool or float, got {attn_mask.dtype}"
                )
            (B, T, _), got = x.shape, tuple(attn_mask.shape)
            full, fits = (B, num_heads, T, T), len(got) in (2, 4)
            if not fits or any(got[i] not in (1, full[i]) for i in range(-len(got), 0)):
                raise ValueError(
                    f"attn_mask must be 2-D or 4-D and broadcast to {full}, got {got}"
                )
        x = x.contiguous()  # so is the result
        if self.norm_first:
            x = x + self._attention(self.norm1(x), attn_mask)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._attention(x, attn_mask))
        return self.norm2(x + self._feed_forward(x))

    def _attention(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        attention = self.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        qkv = qkv.unflatten(2, (3, attention.num_heads, -1))  # (B, T, 3, H, d_k)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d_k) each
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return attention.out_proj(heads.transpose(1, 2).flatten(2))  # (B, T, d_model)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))  # (B, T, d_ff) inside
