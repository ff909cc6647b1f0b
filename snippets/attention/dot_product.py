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
    is_causal: bool = False,
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes softmax(Q K^T * scale + mask) V.

    Args:
        query: (..., L, E).
        key: (..., S, E), with the leading dimensions of query: they never broadcast.
        value: (..., S, Ev), likewise.
        attn_mask: broadcasts to (..., L, S). Bool: True where a query may attend.
            Float: added to the scores.
        is_causal: query i sees keys 0..i. The triangle is aligned top left, as in
            `F.scaled_dot_product_attention`: with L = 1 the query sees key 0 only.
        scale: factor on the scores, 1 / sqrt(E) by default.
        return_weights: also return the weights.

    Returns:
        (..., L, Ev), or the pair of it and the weights (..., L, S). A query that may
        attend to nothing gets zeros.

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
            "query, key and value must be (..., L, E), (..., S, E) and (..., S, Ev) "
            f"with E > 0 and equal leading dimensions, got {q}, {k} and {v}"
        )
    dtypes = query.dtype, key.dtype, value.dtype
    if not query.is_floating_point() or len(set(dtypes)) > 1:
        raise TypeError(f"query, key and value must share a float dtype, got {dtypes}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal=True, got both")

    # A score rounded to bfloat16 is off by percents after exp: keep scores in float32.
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(q[-1]) if scale is None else scale
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * scale  # (..., L, S)
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        try:
            attn_mask = attn_mask.expand(scores.shape)
        except RuntimeError as error:
            expected, got = tuple(scores.shape), tuple(attn_mask.shape)
            raise ValueError(
                f"attn_mask must broadcast to {expected}, got {got}"
            ) from error
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask.is_floating_point():
            scores = scores + attn_mask.to(scores.dtype)
        else:
            raise TypeError(f"attn_mask must be bool or float, got {attn_mask.dtype}")

    # The softmax of a row of -inf is 0 / 0. Mask such rows before it as well as after:
    # a NaN that is only overwritten comes back in the gradient.
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)  # (..., L, 1)
    weights = torch.softmax(scores.masked_fill(nothing, 0), dim=-1)
    weights = weights.masked_fill(nothing, 0)
    output = (weights @ value.to(dtype)).to(value.dtype)  # (..., L, Ev)
    return (output, weights.to(value.dtype)) if return_weights else output
