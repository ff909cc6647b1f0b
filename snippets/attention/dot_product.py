"""Scaled dot-product attention (Vaswani et al., 2017, section 3.2.1).

Each query takes a weighted mean of all values; the weights are the softmax of its
scaled dot products with the keys.
"""

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes softmax(Q K^T * scale + mask) V.

    Args:
        query: (..., L, d_k).
        key: (..., S, d_k), with the leading dimensions of query: they never broadcast.
        value: (..., S, d_v), likewise.
        attn_mask: (L, S), or with all dimensions of the scores (..., L, S); sizes may
            be 1. Bool: True where a query may attend. Float: added to the scores.
            Padding `valid` (B, S) enters (B, H, L, S) as `valid[:, None, None]`.
        is_causal: query i sees keys 0..i. The triangle is aligned top left, as in
            `F.scaled_dot_product_attention`: with L = 1 the query sees key 0 only.
        scale: factor on the scores, 1 / sqrt(d_k) by default.
        return_weights: also return the weights.

    Returns:
        (..., L, d_v), or the pair of it and the weights (..., L, S), in the dtype of
        the inputs, under autocast too. A query that may attend to nothing gets zeros;
        where its float mask is `finfo.min` instead of -inf, it attends evenly.

    Raises:
        ValueError: shapes do not fit, or attn_mask comes together with is_causal.
        TypeError: dtypes differ or are not floats; attn_mask is neither bool nor float.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, eq. 1.
    """
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    fits = k[:-2] + k[-1:] == q[:-2] + q[-1:] and v[:-1] == k[:-1]
    if not fits or min(len(q), len(k)) < 2 or q[-1] == 0:
        raise ValueError(
            "query, key and value must be (..., L, d_k), (..., S, d_k) and "
            "(..., S, d_v) with d_k > 0 and equal leading dimensions, "
            f"got {q}, {k} and {v}"
        )
    dtypes = query.dtype, key.dtype, value.dtype
    if not query.is_floating_point() or len(set(dtypes)) > 1:
        raise TypeError(f"query, key and value must share a float dtype, got {dtypes}")
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal=True, got both")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool or float, got {attn_mask.dtype}")
        got, full = tuple(attn_mask.shape), (*q[:-1], k[-2])  # (..., L, S)
        # No other rank: (B, L, S) would pass for (H, L, S) whenever B = H.
        fits = len(got) in (2, len(full))
        if not fits or any(got[i] not in (1, full[i]) for i in range(-len(got), 0)):
            raise ValueError(
                f"attn_mask must have two or all of the dimensions {full}, each of "
                f"that size or 1, got {got}"
            )

    # A score rounded to bfloat16 is off by percents after exp: keep scores in float32,
    # which autocast would undo. (The meta device has no autocast.)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(q[-1]) if scale is None else scale
    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * scale
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)  # (..., L, S)
        elif attn_mask is not None:
            scores = scores + attn_mask.to(dtype)

        # The softmax of a row of -inf is 0 / 0. Mask such rows before it as well as
        # after: a NaN that is only overwritten comes back in the gradient.
        nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)  # (..., L, 1)
        weights = torch.softmax(scores.masked_fill(nothing, 0), dim=-1)
        weights = weights.masked_fill(nothing, 0)
        output = (weights @ value.to(dtype)).to(value.dtype)  # (..., L, d_v)
    return (output, weights.to(value.dtype)) if return_weights else output
