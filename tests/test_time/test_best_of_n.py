"""Best of N, voting and pass@k against enumeration and the binomial law."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from snippets.test_time.best_of_n import best_of_n, majority_vote, pass_at_k


def test_the_highest_score_wins():
    assert best_of_n(["a", "b", "c"], [0.1, 0.9, 0.5]) == "b"
    assert best_of_n(["a"], [-math.inf]) == "a"
    assert best_of_n(["a", "b"], [-math.inf, -1e300]) == "b"
    assert best_of_n([["x"], ["y"]], torch.tensor([1.0, 2.0])) == ["y"]


def test_the_first_of_equal_scores_wins():
    assert best_of_n("abc", [1.0, 2.0, 2.0]) == "b"
    assert best_of_n("abc", torch.zeros(3, dtype=torch.bfloat16)) == "a"


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_it_chooses_as_torch_argmax_does(n):
    scores = torch.randn(n)
    rows = torch.randn(n, 3)
    assert torch.equal(best_of_n(rows, scores), rows[scores.argmax()])


def test_the_most_frequent_answer_wins_whatever_the_order():
    for order in set(itertools.permutations("aabbbc")):
        assert majority_vote(order) == "b"


def test_of_equal_answers_the_one_given_first_wins():
    assert majority_vote(["b", "a", "a", "b"]) == "b"
    assert majority_vote([3, 1, 2]) == 3
    assert majority_vote("abba", [0, 0, 0, 0]) == "a"


def test_without_weights_it_is_counting():
    answers = torch.randint(4, (60,)).tolist()
    assert majority_vote(answers) == Counter(answers).most_common(1)[0][0]
    assert majority_vote(answers, [2] * 60) == majority_vote(answers)


def test_one_sure_answer_outweighs_two_unsure_ones():
    assert majority_vote("aab", [0.2, 0.2, 0.5]) == "b"
    assert majority_vote("aab", [0.3, 0.3, 0.5]) == "a"
    assert majority_vote("aab", torch.tensor([0.25, 0.25, 0.75])) == "b"


def test_votes_are_added_exactly():
    # In floating point 0.1 + 0.2 + 0.3 depends on the order; here all have 0.6.
    assert majority_vote("baabba", [0.1, 0.3, 0.2, 0.2, 0.3, 0.1]) == "b"
    assert majority_vote("ab" + 10 * "a", [0.0, 1.0] + 10 * [0.1]) == "a"


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        draws = list(itertools.combinations(right, k))
        share = Fraction(sum(map(any, draws)), len(draws))
        assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-15)


@pytest.mark.parametrize(("p", "k"), [(0.3, 1), (0.3, 4), (0.05, 8), (0.9, 3)])
def test_pass_at_k_is_unbiased_and_the_plain_guess_is_not(p, k, reference_library):
    binomial = reference_library("scipy.stats").binom(20, p)
    mean = sum(binomial.pmf(c) * pass_at_k(20, c, k) for c in range(21))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plain = sum(binomial.pmf(c) * (1 - (1 - c / 20) ** k) for c in range(21))
    assert k == 1 or plain < mean - 1e-3


def test_pass_at_k_at_its_ends():
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 10, 1) == 1.0
    assert pass_at_k(10, 1, 10) == 1.0
    assert pass_at_k(1, 1, 1) == 1.0
    assert isinstance(pass_at_k(10, 3, 2), float)
    # comb is exact: no overflow, where a product of floats would drift
    assert pass_at_k(100_000, 1, 500) == pytest.approx(0.005, rel=1e-12)


def test_more_draws_never_hurt():
    values = [pass_at_k(30, 4, k) for k in range(1, 31)]
    assert values == sorted(values) and len(set(values[:27])) == 27


def test_what_does_not_fit_is_refused(refuses):
    with refuses(
        ValueError,
        "needs one of scores for each of candidates, got 0 scores for 0 candidates",
    ):
        best_of_n([], [])
    with refuses(
        ValueError,
        "needs one of scores for each of candidates, got 1 scores for 2 candidates",
    ):
        best_of_n("ab", [1.0])
    with refuses(ValueError, "scores must not be NaN, got [1.0, nan]"):
        best_of_n("ab", [1.0, math.nan])
    with refuses(
        ValueError,
        "needs one of weights for each of answers, got 0 weights for 0 answers",
    ):
        majority_vote([])
    with refuses(
        ValueError,
        "needs one of weights for each of answers, got 3 weights for 2 answers",
    ):
        majority_vote("ab", [1, 2, 3])
    with refuses(ValueError, "weights must not be NaN, got [nan, 1.0]"):
        majority_vote("ab", [math.nan, 1])
    for bad in (-0.5, math.inf):
        with refuses(
            ValueError, f"weights must be finite and not negative, got [1.0, {bad}]"
        ):
            majority_vote("ab", [1, bad])


@pytest.mark.parametrize(
    ("n", "c", "k"), [(0, 0, 1), (5, -1, 1), (5, 6, 1), (5, 1, 0), (5, 1, 6)]
)
def test_counts_outside_their_range_are_refused(n, c, k, refuses):
    with refuses(ValueError, f"needs c in 0..n and k in 1..n, got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)
