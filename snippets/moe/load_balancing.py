"""Load balancing of experts (Fedus et al., 2021, section 2.2).

A router that sends its tokens to few experts leaves the others untrained. One loss
rewards even shares, another keeps the router's logits small.
"""

import torch
from torch import Tensor


def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """Counts the share of the choices that each expert got.

    Args:
        indices: the chosen experts, integers from 0 to E - 1, of any shape. Padding is
            left out as in `indices[valid]`.
        num_experts: E.

    Returns:
        (E,), float32. Sums to 1, or to 0 where there are no choices.

    Raises:
        ValueError: num_experts < 1, or an index is out of range.
        TypeError: indices are not of an integer dtype.

    Source:
        Fedus et al., 2021, "Switch Transformers", 2101.03961, eq. 5.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    integers = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
    if indices.dtype not in integers:
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    found = indices.flatten().long()
    # bincount would make room for an index that is too large.
    outside = found[(found < 0) | (found >= num_experts)]
    if len(outside):
        raise ValueError(
            f"indices must be in 0..{num_experts - 1}, got {outside[0].item()}"
        )
    counts = torch.bincount(found, minlength=num_experts)  # (E,)
    return counts.to(torch.float32) / max(len(found), 1)


def load_balancing_loss(
    router_logits: Tensor, top_k: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Computes E times the sum over the experts of f_i * P_i.

    f_i is the share of the tokens that choose expert i among their top_k, P_i the mean
    probability of i. Only P has a gradient. Added to the loss with a small factor
    (Switch: 0.01), for each layer on its own.

    Args:
        router_logits: (..., E), of all tokens of one layer; noise included, if any.
        top_k: experts that a token chooses, k.
        mask: (...), bool, True for a token, False for padding, which counts nowhere.

    Returns:
        0-d, in float32 or better: k where all shares are even, E where all tokens go to
        the same experts, 0 where there is no token.

    Raises:
        ValueError: the shape of router_logits or mask does not fit, or top_k is not in
            1..E.
        TypeError: router_logits is not of a float dtype, or mask is not bool.

    Source:
        Fedus et al., 2021, "Switch Transformers", 2101.03961, eq. 4 to 6; for k > 1
        counted as in Mixtral's implementation in transformers.
    """
    logits, mask, count = _tokens(router_logits, mask)
    _, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts}, got {top_k}")
    # A stable sort, as in the router: of equal logits the lower index is chosen.
    order = logits.sort(descending=True, stable=True).indices
    chosen = order[:, :top_k]  # (N, k)
    f = torch.zeros_like(logits).scatter(1, chosen, 1.0)  # (N, E)
    f = (f * mask).sum(dim=0) / count  # (E,), sums to k
    P = (logits.softmax(dim=1) * mask).sum(dim=0) / count  # (E,), sums to 1
    return num_experts * (f * P).sum()


def router_z_loss(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the mean square of log(sum(exp(logits))), to keep logits small.

    A bfloat16 logit above 128 is rounded to a whole number. Off by a half, its exp is
    off by a factor of 1.6.

    Args:
        router_logits: (..., E).
        mask: (...), bool, True for a token, False for padding.

    Returns:
        0-d, in float32 or better; 0 where there is no token.

    Raises:
        ValueError: the shape of router_logits or mask does not fit.
        TypeError: router_logits is not of a float dtype, or mask is not bool.

    Source:
        Zoph et al., 2022, "ST-MoE", 2202.08906, eq. 5.
    """
    logits, mask, count = _tokens(router_logits, mask)
    squares = logits.logsumexp(dim=1, keepdim=True).square()  # (N, 1)
    return (squares * mask).sum() / count


def _tokens(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits (N, E) in float32 or better, a mask (N, 1) and how many it has."""
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"router_logits must be (..., E), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"router_logits must have a float dtype, got {logits.dtype}")
    if mask is None:
        mask = torch.ones_like(logits[..., 0], dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"mask must be {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}"
        )
    mask = mask.reshape(-1, 1)  # (N, 1)
    logits = logits.reshape(-1, logits.shape[-1])  # (N, E)
    # Padding may hold anything, NaN too, and 0 * NaN is NaN.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(~mask, 0)
    return logits, mask, mask.sum().clamp(min=1)
