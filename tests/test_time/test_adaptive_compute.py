"""The adaptive vote against scipy's Beta distribution and a plain majority."""

import itertools
import random
from collections import Counter

import pytest

from snippets.test_time.adaptive_compute import adaptive_majority_vote


def from_list(answers):
    return iter(answers).__next__


def stops_at(answers, beta, confidence, min_samples):
    """When the rule of the paper stops, by scipy."""
    for used in range(1, len(answers) + 1):
        counts = sorted(Counter(answers[:used]).values(), reverse=True)
        a, b = counts[0], counts[1] if len(counts) > 1 else 0
        if used >= min_samples and beta(a + 1, b + 1).sf(0.5) >= confidence:
            return used
    return len(answers)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("min_samples", [1, 2, 5])
def test_it_stops_where_the_beta_distribution_says(
    confidence, min_samples, reference_library
):
    beta = reference_library("scipy.stats").beta
    draw = random.Random(0)
    for shares in ([1, 1], [5, 1], [3, 2, 2], [1, 1, 1, 1]):
        for _ in range(5):
            answers = draw.choices("abcd"[: len(shares)], shares, k=30)
            answer, used = adaptive_majority_vote(
                from_list(answers), 30, confidence, min_samples
            )
            assert used == stops_at(answers, beta, confidence, min_samples)
            counts = Counter(answers[:used])
            assert answer == max(counts, key=counts.get)


@pytest.mark.parametrize(("confidence", "needed"), [(0.95, 4), (0.99, 6), (0.75, 2)])
def test_unanimous_answers_end_it_after_few(confidence, needed):
    # P(share > 1/2) after a answers of one kind is 1 - 2^-(a + 1)
    assert adaptive_majority_vote(lambda: "x", 40, confidence) == ("x", needed)
    assert 1 - 2.0 ** -(needed + 1) >= confidence > 1 - 2.0**-needed or needed == 2


def test_the_defaults_are_95_percent_and_two_samples():
    assert adaptive_majority_vote(lambda: "x", 40) == ("x", 4)
    assert adaptive_majority_vote(lambda: "x", 40, 0.5) == ("x", 2)
    assert adaptive_majority_vote(lambda: "x", 40, 0.5, 1) == ("x", 1)


def test_a_question_that_divides_spends_the_budget_and_no_more():
    asked = []

    def sample():
        asked.append(None)
        return len(asked) % 2

    assert adaptive_majority_vote(sample, 25) == (1, 25)
    assert len(asked) == 25
    assert adaptive_majority_vote(from_list("a"), 1, min_samples=1) == ("a", 1)
    assert adaptive_majority_vote(from_list("ab"), 2) == ("a", 2)


def test_of_equal_answers_the_one_given_first_wins():
    assert adaptive_majority_vote(from_list("baab"), 4) == ("b", 4)


def test_only_the_second_counts_against_the_leader():
    # a has 6 of 12, as many as all others together; the second has 1
    answers = "abacadaeafag"
    _, used = adaptive_majority_vote(from_list(answers), 12)
    assert used < 12


def test_harder_questions_cost_more_samples():
    draw = random.Random(0)

    def mean(p):
        def sample():
            return draw.random() < p

        return sum(adaptive_majority_vote(sample, 40)[1] for _ in range(200)) / 200

    costs = [mean(p) for p in (0.99, 0.8, 0.65, 0.5)]
    assert all(y > x + 1 for x, y in itertools.pairwise(costs))


@pytest.mark.parametrize(("low", "high"), [(0, 5), (-1, 5), (3, 2)])
def test_budgets_that_make_no_sense_are_refused(low, high, refuses):
    got = f"got min_samples={low}, max_samples={high}"
    with refuses(ValueError, f"needs 1 <= min_samples <= max_samples, {got}"):
        adaptive_majority_vote(lambda: 0, high, min_samples=low)


@pytest.mark.parametrize("confidence", [0.49, 1.0, -1.0, float("nan")])
def test_a_confidence_outside_its_range_is_refused(confidence, refuses):
    with refuses(ValueError, f"{confidence=} must be in [0.5, 1)"):
        adaptive_majority_vote(lambda: 0, 5, confidence)
