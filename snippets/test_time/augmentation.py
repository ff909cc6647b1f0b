"""Test-time augmentation (Krizhevsky et al., 2012, section 4.1).

A classifier sees an input in several versions, and its probabilities are averaged.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


@torch.no_grad()
def test_time_augmentation(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    transforms: Iterable[Callable[[Tensor], Tensor]],
) -> Tensor:
    """The mean over versions of the input of softmax(model(version)); no gradient.

    Args:
        model: (N, ...) to logits (N, V). It stays in the mode it is in: call `eval()`
            first.
        x: (N, ...).
        transforms: functions of a batch. Put the identity among them to keep the input
            itself; the model runs once for each.

    Returns:
        (N, V), probabilities in float32 at least.

    Raises:
        ValueError: no transforms, or logits of one version that have another shape.

    Source:
        Krizhevsky et al., 2012, "ImageNet Classification with Deep Convolutional Neural
        Networks", section 4.1: ten crops and reflections.
    """
    total, count = None, 0
    for transform in transforms:
        logits = model(transform(x))
        wide = torch.promote_types(logits.dtype, torch.float32)
        probs = torch.softmax(logits, dim=-1, dtype=wide)  # (N, V)
        if total is not None and total.shape != probs.shape:
            shapes = f"{tuple(probs.shape)} after {tuple(total.shape)}"
            raise ValueError(f"logits of all transforms must be alike, got {shapes}")
        total, count = probs if total is None else total + probs, count + 1
    if total is None:
        raise ValueError("transforms must not be empty")
    return total / count


test_time_augmentation.__test__ = False  # its name would make pytest collect it
