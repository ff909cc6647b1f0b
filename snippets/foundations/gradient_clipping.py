"""Clipping gradients by their norm (Pascanu, Mikolov, Bengio, 2013, algorithm 1).

Where the gradient is longer than max_norm it is shortened to that length. Its direction
stays.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def total_grad_norm(
    parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0
) -> Tensor:
    """Norm of all gradients together, as if they were one vector.

    Args:
        parameters: a tensor or any iterable of tensors. Those without a gradient, or
            with an empty one, do not count.
        norm_type: p of the p-norm; `math.inf` is the largest absolute value.

    Returns:
        A 0-d tensor in float32 or better (torch's own stays in float16, and overflows);
        0 where there is no gradient at all.

    Raises:
        ValueError: norm_type is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if not grads:
        return torch.tensor(0.0)
    norms = []
    for grad in grads:
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=wide)
        norms.append(norm.to(grads[0].device))
    # The norm of the norms is the norm of it all, and nothing has to be concatenated.
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Multiplies all gradients by one factor, so that their norm is at most max_norm.

    Args:
        parameters: a tensor or any iterable of tensors; their `grad` is changed.
        max_norm: longest gradient that is let through. There is no default.
        norm_type: p of the p-norm.
        error_if_nonfinite: refuse a norm that is infinite or NaN, before any change.
            Otherwise an infinite norm makes zeros of the finite gradients and NaN of
            the others, and a NaN makes NaN of all.

    Returns:
        The norm *before* clipping, as `total_grad_norm` gives it.

    Raises:
        ValueError: max_norm is negative, or norm_type not positive.
        RuntimeError: the norm is not finite and error_if_nonfinite is set.

    Source:
        Pascanu et al., 2013, "On the difficulty of training recurrent neural networks",
        1211.5063; factor and edge cases as in `torch.nn.utils.clip_grad_norm_`.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    # A generator can be gone through once, and it takes two rounds.
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = total_grad_norm(parameters, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of the gradients must be finite, got {total}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # never lengthens
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))
    return total
