"""What it is (Who, when, section).

What it computes, in a sentence or two.
"""

import torch


def double(x: torch.Tensor) -> torch.Tensor:
    """Computes 2 x.

    Args:
        x: (..., D), floating point.

    Returns:
        (..., D), in the dtype of x.

    Raises:
        ValueError: x is not floating point.

    Source:
        Who, when, section, equation.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    return x + x  # (..., D)
