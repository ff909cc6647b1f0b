"""Transformer block (Vaswani et al., 2017, section 3.1; Xiong et al., 2020, figure 1).

Tokens exchange information in the attention and are transformed one by one in the
feed-forward network; a residual connection goes around each of the two.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """x + Sublayer(Norm(x)), for self-attention and then for the feed-forward network.

    Parameters and initialization are those of `nn.TransformerEncoderLayer`, and a
    `state_dict` of one loads into the other. There is no dropout.

    Args:
        d_model: features of a token, D.
        num_heads: number of attention heads, H.
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
        # Not batch_first=True: its fused inference path returns NaN for a token that
        # may attend to nothing.
        self.self_attn = nn.MultiheadAttention(d_model, num_heads)
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm_first = norm_first

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Applies attention, then the feed-forward network.

        Args:
            x: (B, T, D).
            attn_mask: (T, T), or (B * H, T, T) for one mask per head.
                BEWARE: in a bool mask True means MASKED OUT, as in
                `nn.TransformerEncoderLayer` and opposite to
                `F.scaled_dot_product_attention`. A float mask is added to the scores.

        Returns:
            (B, T, D).

        Raises:
            ValueError: the shape of x or attn_mask does not fit.
        """
        d_model, num_heads = self.self_attn.embed_dim, self.self_attn.num_heads
        if x.dim() != 3 or x.shape[2] != d_model:
            raise ValueError(f"x must be (B, T, {d_model}), got {tuple(x.shape)}")
        B, T, _ = x.shape
        if attn_mask is not None:
            expected, got = [(T, T), (B * num_heads, T, T)], tuple(attn_mask.shape)
            if got not in expected:
                raise ValueError(
                    f"attn_mask must be {expected[0]} or {expected[1]}, got {got}"
                )
        if self.norm_first:
            x = x + self._attention(self.norm1(x), attn_mask)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._attention(x, attn_mask))
        return self.norm2(x + self._feed_forward(x))

    def _attention(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        x = x.transpose(0, 1)  # (T, B, D)
        x, _ = self.self_attn(x, x, x, attn_mask=attn_mask, need_weights=False)
        return x.transpose(0, 1)  # (B, T, D)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))  # (B, T, d_ff) inside
