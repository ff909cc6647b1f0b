"""TITLE (authors, year, section).

What it computes, in one or two sentences.
"""

from torch import Tensor


def NAME(x: Tensor) -> Tensor:
    """What it does to x.

    Args:
        x: (..., D), what that is, in which unit.

    Returns:
        (..., D).

    Raises:
        TypeError: x is not a floating point tensor.

    Source:
        Authors, year, "Title", where to find it, which equation.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    return x * x  # (..., D)
