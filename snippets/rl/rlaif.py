"""RLAIF: a reward model learns from an AI's preferences (Lee et al., 2023, section 2).

A judge says how likely one answer is better than another. The rewards of the answers
are fitted to that by the model of Bradley and Terry (1952), as with labels of people.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def ai_preferences(
    judge: Callable[[Any, Any, Any], float | Tensor],
    prompts: Sequence[Any],
    first: Sequence[Any],
    second: Sequence[Any],
) -> Tensor:
    """Labels pairs of answers: how likely `first` is better than `second`.

    The judge is asked about each pair in both orders, and the answers are averaged, so
    a liking for the place in which an answer stands favors neither. What the judge
    likes in the answers themselves, their length for one, stays.

    Args:
        judge: judge(prompt, a, b) is its probability that a, shown first, is better.
        prompts: N prompts, in whatever form the judge takes.
        first, second: N answers each, to the prompts in turn.

    Returns:
        (N,), float32, on the CPU. Swapped answers have the label 1 minus it.

    Raises:
        ValueError: the numbers of prompts and answers differ or are 0, or the judge's
            answer is no number in [0, 1].
        TypeError: a string where a list or a probability should be.

    Source:
        Lee et al., 2023, 2309.00267, section 2.1.1.
    """
    given = {"prompts": prompts, "first": first, "second": second}
    for name, values in given.items():
        if isinstance(values, str):  # it would be judged letter by letter
            raise TypeError(f"{name} must be a list, got the string {values!r}")
    if len({len(values) for values in given.values()}) > 1:
        got = ", ".join(f"{len(values)} {name}" for name, values in given.items())
        raise ValueError(f"each prompt must have two answers, got {got}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold one at least, got none")
    labels = []
    for n in range(len(prompts)):
        prompt, a, b = prompts[n], first[n], second[n]
        forth = _probability(judge(prompt, a, b), n)
        back = _probability(judge(prompt, b, a), n)
        labels.append((forth + 1 - back) / 2)
    return torch.tensor(labels, dtype=torch.float32)


def preference_loss(
    reward_first: Tensor, reward_second: Tensor, target: Tensor
) -> Tensor:
    """Cross-entropy of σ(reward_first - reward_second) to the labels, averaged.

    Args:
        reward_first, reward_second: (N,), or of any one shape, of the paired answers.
        target: of that shape, in [0, 1], how likely the first is better; bool or int
            for hard labels. It gets no gradient, and moves to the rewards' device.

    Returns:
        0-d, in float32 or better. Its gradient to each reward_first is
        (σ(reward_first - reward_second) - target) / N.

    Raises:
        ValueError: shapes differ, there are no pairs, or a target is not in [0, 1]
            (a compiled graph can't look at values, and lets it pass).

    Source:
        Ouyang et al., 2022, 2203.02155, eq. 1, with the soft labels of Lee et al.,
        2023, 2309.00267, section 2.2.1.
    """
    shapes = [tuple(x.shape) for x in (reward_first, reward_second, target)]
    if len(set(shapes)) > 1:  # (N, 1) and (N,) would broadcast to (N, N)
        got = ", ".join(map(str, shapes))
        raise ValueError(f"rewards and target must have one shape, got {got}")
    if target.numel() == 0:
        raise ValueError("target must hold one label at least, got none")
    if not torch.compiler.is_compiling():
        outside = ~((target >= 0) & (target <= 1))  # NaN is outside too
        if outside.any():
            got = target[outside][0].item()
            raise ValueError(f"target must be in [0, 1], got {got}")
    margin = _wide(reward_first) - _wide(reward_second)
    target = target.detach().to(margin)
    log_first, log_second = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -(target * log_first + (1 - target) * log_second).mean()


def _probability(answer: float | Tensor, n: int) -> float:
    if isinstance(answer, str):  # float("1") would take the name of an answer
        raise TypeError(f"judge must return a probability, got the string {answer!r}")
    p = float(answer.item() if isinstance(answer, Tensor) else answer)
    if not 0 <= p <= 1:
        raise ValueError(f"judge must return a probability, got {p} for pair {n}")
    return p


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
