"""Sparse keys and values (Joo et al., 2025, per-token magnitude pruning).

Entries near 0 are set to 0, so that only the others have to be stored. What that
saves depends on the format, which pays for the places of the entries too.
"""

import torch
from torch import Tensor


def topk_sparsify(x: Tensor, k: int, dim: int = -1) -> Tensor:
    """Keeps the k entries of largest magnitude along a dimension, and zeros the rest.

    Args:
        x: of any shape, float.
        k: how many entries stay: exactly k, also where magnitudes are equal (the first
            of them stay) or 0. NaN counts as the largest, so that it is not hidden.
        dim: dimension that is sorted; by default each row is.

    Returns:
        Of x's shape and dtype. Gradients flow to the entries that stay.

    Raises:
        ValueError: k is outside 0 to the size of that dimension, or x has no such one.
        TypeError: x is not float. (The magnitude of an int8 -128 would be -128.)

    Source:
        Joo et al., 2025, "Mustafar", 2505.22913.
    """
    _check_float(x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x {tuple(x.shape)}, got {dim}")
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(f"k must be from 0 to {x.shape[dim]}, got {k}")
    # Not topk: which of several equal entries it returns is not defined.
    order = x.detach().abs().sort(dim=dim, descending=True, stable=True).indices
    dropped = order.narrow(dim, k, x.shape[dim] - k)
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(dim, dropped, True)
    return x.masked_fill(mask, 0)


def threshold_sparsify(x: Tensor, threshold: float) -> Tensor:
    """Zeros the entries whose magnitude is below a threshold; equal to it, they stay.

    Args:
        x: of any shape, float. NaN is below no threshold, and stays.
        threshold: in the unit of x.

    Returns:
        Of x's shape and dtype; how many entries stay depends on x. Gradients flow to
        them.

    Raises:
        ValueError: threshold is negative or NaN.
        TypeError: x is not float.
    """
    _check_float(x)
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    return x.masked_fill(x.detach().abs() < threshold, 0)


def density(x: Tensor) -> float:
    """Share of the entries of x, of any shape, that are not 0.

    Raises:
        ValueError: x has no entries.
    """
    if not x.numel():
        raise ValueError(f"x must have entries, got shape {tuple(x.shape)}")
    return x.count_nonzero().item() / x.numel()


def coo_bytes(x: Tensor) -> int:
    """Bytes of x as a coordinate list: of each non-zero entry its value and place.

    A place is an int64 for each dimension of x, as in `Tensor.to_sparse()`.
    """
    return x.count_nonzero().item() * (x.element_size() + 8 * x.dim())


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be float, got {x.dtype}")
