"""Low-rank compression by principal components (Eckart and Young, 1936).

Vectors that vary in few directions are stored as their coordinates in those: k numbers
for D. No other k directions leave a smaller squared error.
"""

import torch
from torch import Tensor


def principal_components(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k directions in which the rows of x vary most.

    Args:
        x: (N, D), float; no gradient flows back: a basis is fitted once.
        k: 1 to min(N, D).

    Returns:
        basis (D, k), orthonormal columns, the most important first, each with its
        largest entry positive; mean (D,); explained, 0-d, the part of the variance that
        is kept: 1 where there is none. In float32 or better.

    Raises:
        ValueError: x is not (N, D), or k is out of range.
        TypeError: x is not float.
        torch.linalg.LinAlgError: x holds a NaN or an infinity.

    Source:
        Eckart and Young, 1936, "The approximation of one matrix by another of lower
        rank"; Pearson, 1901.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be float, got {x.dtype}")
    if len(x.shape) != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    if k not in range(1, min(x.shape) + 1):
        raise ValueError(f"k must be from 1 to {min(x.shape)}, got {k}")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dim=0)  # (D,)
    _, sigma, directions = torch.linalg.svd(x - mean, full_matrices=False)
    basis = directions[:k].mT  # (D, k)
    # A direction may point either way: choose, or each machine chooses for itself.
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))  # (1, k)
    basis = (basis * largest.sign()).contiguous()

    tiny = torch.finfo(x.dtype).tiny
    variances = (sigma / sigma[0].clamp(min=tiny)).square()  # σ² itself may overflow
    explained = variances[:k].sum() / variances.sum()
    return basis, mean, explained.nan_to_num(1)  # 0 / 0: all rows are equal


def compress(x: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Computes (x - mean) basis: (..., D) to (..., k), in the dtype of x.

    Args:
        x: (..., D), float.
        basis: (D, k).
        mean: (D,).

    Raises:
        ValueError: the shapes do not fit.
        TypeError: x is not float.
    """
    _check("x", x, basis, mean, basis.shape[:1])
    with torch.autocast(_device(x), enabled=False):  # it would round to half
        x_wide, basis, mean = _wide(x, basis, mean)
        return ((x_wide - mean) @ basis).to(x.dtype)


def decompress(z: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Computes z basisᵀ + mean: (..., k) to (..., D), in the dtype of z.

    What compress has dropped stays lost: this is the nearest point that the basis can
    reach. Raises as compress does, with z for x.
    """
    _check("z", z, basis, mean, basis.shape[1:])
    with torch.autocast(_device(z), enabled=False):
        z_wide, basis, mean = _wide(z, basis, mean)
        return (z_wide @ basis.mT + mean).to(z.dtype)


def _check(name: str, x: Tensor, basis: Tensor, mean: Tensor, width: tuple) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be float, got {x.dtype}")
    fits = len(basis.shape) == 2 and mean.shape == basis.shape[:1]
    if not fits or x.shape[-1:] != width:
        size = "D" if name == "x" else "k"
        raise ValueError(
            f"{name}, basis and mean must be (..., {size}), (D, k) and (D,), got "
            f"{tuple(x.shape)}, {tuple(basis.shape)} and {tuple(mean.shape)}"
        )


def _device(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # the meta device has no autocast


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
