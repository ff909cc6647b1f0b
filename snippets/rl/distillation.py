"""Knowledge distillation (Hinton, Vinyals, Dean, 2015, section 2).

A student learns what a teacher gives to every class, not only which class is right.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """alpha τ² KL(teacher ‖ student) at temperature τ + (1 - alpha) cross-entropy.

    Args:
        student_logits: (..., V), a row for each example or token.
        teacher_logits: the same shape; they get no gradient.
        labels: (...), int64, the right classes, for the cross-entropy (at temperature
            1). A row of -100, such as padding, counts for neither term.
        temperature: τ, of both softmaxes in the KL. Its gradient shrinks by 1 / τ²,
            and the factor τ² takes that out again.
        alpha: the weight of the teacher, from 0 to 1; at 1 no labels are needed.

    Returns:
        The mean over the rows that count, 0-d, in nats, in float32 or better; 0 where
        none counts.

    Raises:
        ValueError: temperature is not positive and finite, alpha is not in [0, 1],
            alpha is below 1 without labels, or shapes do not fit.
        TypeError: labels are not int64.

    Source:
        Hinton et al., 2015, 1503.02531, section 2, eq. 1 and 2.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    shape = student_logits.shape
    if shape != teacher_logits.shape or not (shape and shape[-1]):
        got = f"{tuple(shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher must be one (..., V >= 1), got {got}")
    if labels is None:
        if alpha < 1:
            raise ValueError(f"labels must be given when alpha is {alpha}, got None")
        counts = torch.ones_like(student_logits[..., 0], dtype=torch.bool)  # (...)
    else:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
        if labels.shape != shape[:-1]:
            got = f"{tuple(labels.shape)} for logits {tuple(shape)}"
            raise ValueError(f"labels must be one for each row, got {got}")
        counts = labels != -100  # (...)
    # Padding may hold NaN: it goes before the softmax, or the gradient brings it back.
    student = _wide(student_logits).masked_fill(~counts[..., None], 0)
    teacher = _wide(teacher_logits.detach()).masked_fill(~counts[..., None], 0)

    soft = hard = 0
    if alpha > 0:
        log_p = (teacher / temperature).log_softmax(dim=-1)  # (..., V)
        log_q = (student / temperature).log_softmax(dim=-1)
        # What the teacher rules out by -inf asks nothing of the student: no 0 · inf.
        gap = (log_p - log_q).masked_fill(log_p == -math.inf, 0)
        soft = alpha * temperature**2 * (log_p.exp() * gap).sum()
    if alpha < 1:
        rows = student.reshape(-1, shape[-1])  # (N, V)
        hard = F.cross_entropy(rows, labels.reshape(-1), reduction="sum")
    return (soft + (1 - alpha) * hard) / counts.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
