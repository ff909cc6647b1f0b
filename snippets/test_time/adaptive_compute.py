"""Adaptive consistency (Aggarwal et al., 2023, section 3).

Answers are sampled one after the other, until the leader is unlikely to be overtaken:
easy questions cost few samples, hard ones many.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

Answer = TypeVar("Answer", bound=Hashable)


def adaptive_majority_vote(
    sample: Callable[[], Answer],
    max_samples: int,
    confidence: float = 0.95,
    min_samples: int = 2,
) -> tuple[Answer, int]:
    """Samples answers until the majority is sure enough, or the budget is spent.

    With a votes for the leader and b for the second, the leader's share of both has the
    distribution Beta(a + 1, b + 1), if all shares were equally likely beforehand.
    Sampling stops when the share is above 1/2 with probability `confidence`.

    Args:
        sample: draws one answer; called `max_samples` times at most.
        max_samples: the budget.
        confidence: from 1/2 to below 1.
        min_samples: drawn in any case.

    Returns:
        The answer given most often, the first of equals, and how many were sampled.

    Raises:
        ValueError: min_samples < 1, max_samples < min_samples, or confidence outside
            [1/2, 1).

    Source:
        Aggarwal et al., 2023, "Let's Sample Step by Step: Adaptive-Consistency",
        2305.11860.
    """
    if min_samples < 1 or max_samples < min_samples:
        raise ValueError(
            f"needs 1 <= min_samples <= max_samples, got {min_samples=}, {max_samples=}"
        )
    if not 0.5 <= confidence < 1:
        raise ValueError(f"{confidence=} must be in [0.5, 1)")
    votes: Counter[Answer] = Counter()
    for used in range(1, max_samples + 1):
        votes[sample()] += 1
        (leader, a), *others = votes.most_common()  # equals: the first one counted
        b = others[0][1] if others else 0
        if used >= min_samples and _above_half(a, b) >= confidence:
            break
    return leader, used


def _above_half(a: int, b: int) -> float:
    """P(share > 1/2) for Beta(a + 1, b + 1): at most a heads in a + b + 1 tosses."""
    tosses = a + b + 1
    return sum(math.comb(tosses, heads) for heads in range(a + 1)) / 2**tosses
