"""Dropout (Srivastava et al., 2014, section 4; scaled in training as in section 10).

Every element is zeroed with probability p on its own, and the others grow by 1/(1 - p),
so that the expectation stays what it was.
"""

import torch
from torch import Tensor


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes a random part of x and scales the rest.

    Args:
        x: any shape, float.
        p: probability of *zeroing* an element. (In the paper p is that of keeping it.)
        training: False returns x as it is.
        generator: where the mask is drawn from; the default generator if None.

    Returns:
        x * mask / (1 - p), of the shape of x. What is dropped is 0 even where x is
        infinite or NaN, which `F.dropout` turns into NaN; all zeros for p = 1.

    Raises:
        ValueError: p is outside [0, 1].
        TypeError: x is not a float tensor.

    Source:
        Srivastava et al., 2014, "Dropout", JMLR 15.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {x.dtype}")
    if not training or p == 0:
        return x
    mask = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    if p < 1:  # otherwise nothing is kept
        mask.div_(1 - p)
    return (x * mask).masked_fill(mask == 0, 0)  # infinity times 0 is NaN
