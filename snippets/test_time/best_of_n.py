"""Best of N, majority vote and pass@k (Wang et al., 2022; Chen et al., 2021).

Three ways to use several answers to one question: a judge picks one, they vote, or one
right answer among them is enough.
"""

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Hashable)


def best_of_n(candidates: Sequence[T], scores: Sequence[float]) -> T:
    """The candidate with the highest score, the first of equals.

    Args:
        candidates: N of anything.
        scores: N numbers, or a tensor (N,).

    Raises:
        ValueError: no candidates, another number of scores, or a score that is NaN.

    Source:
        Stiennon et al., 2020, "Learning to summarize from human feedback", 2009.01325.
    """
    scores = _numbers(scores, candidates, "scores", "candidates")
    return candidates[max(range(len(scores)), key=scores.__getitem__)]


def majority_vote(
    answers: Sequence[Answer], weights: Sequence[float] | None = None
) -> Answer:
    """The answer given most often, or with the largest weight; the first of equals.

    Args:
        answers: N answers; what is equal counts as one.
        weights: N numbers, or a tensor (N,): 1 each by default. A score of each answer
            makes it a weighted vote.

    Raises:
        ValueError: no answers, another number of weights, or one that is negative, NaN
            or infinite.

    Source:
        Wang et al., 2022, "Self-Consistency Improves Chain of Thought Reasoning",
        2203.11171, section 2.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    weights = _numbers(weights, answers, "weights", "answers")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {weights}")
    votes: dict[Answer, list[float]] = {}
    for n, answer in enumerate(answers):
        votes.setdefault(answer, []).append(weights[n])
    # fsum is exact: equal votes stay equal in whatever order they came.
    return max(votes, key=lambda answer: math.fsum(votes[answer]))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers is right, drawn from n of which c are right.

    1 - C(n - c, k) / C(n, k): unbiased, where 1 - (1 - c / n)^k is not.

    Args:
        n: answers that were sampled.
        c: how many of them are right.
        k: how many are drawn, without putting back.

    Raises:
        ValueError: n < 1, c outside 0..n or k outside 1..n.

    Source:
        Chen et al., 2021, "Evaluating Large Language Models Trained on Code",
        2107.03374, eq. 1.
    """
    if n < 1 or not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"needs c in 0..n and k in 1..n, got {n=}, {c=}, {k=}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def _numbers(
    values: Sequence[float], to: Sequence, name: str, what: str
) -> list[float]:
    values = [float(value) for value in values]
    if not len(to) or len(values) != len(to):
        numbers = f"{len(values)} {name} for {len(to)} {what}"
        raise ValueError(f"needs one of {name} for each of {what}, got {numbers}")
    if any(map(math.isnan, values)):
        raise ValueError(f"{name} must not be NaN, got {values}")
    return values
