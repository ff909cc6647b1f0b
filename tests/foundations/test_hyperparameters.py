"""Grid search against scikit-learn's ParameterGrid and the maximum of a table."""

import math
from itertools import permutations

import pytest
import torch

from snippets.foundations.hyperparameters import grid, grid_search


def test_the_grid_has_every_combination_the_last_name_fastest():
    assert grid(lr=[0.1, 0.01], depth=[1, 2, 3]) == [
        {"lr": 0.1, "depth": 1},
        {"lr": 0.1, "depth": 2},
        {"lr": 0.1, "depth": 3},
        {"lr": 0.01, "depth": 1},
        {"lr": 0.01, "depth": 2},
        {"lr": 0.01, "depth": 3},
    ]


@pytest.mark.parametrize(
    "sizes", [(1,), (4,), (2, 3), (3, 1, 2), (2, 2, 2, 2)], ids=str
)
def test_the_grid_is_that_of_scikit_learn(sizes, reference_library):
    library = reference_library("sklearn.model_selection")
    names = "abcd"  # scikit-learn sorts them
    choices = {n: list(range(size)) for n, size in zip(names, sizes, strict=False)}
    ours = grid(**choices)
    assert ours == list(library.ParameterGrid(choices))
    assert len(ours) == math.prod(sizes)


def test_values_may_be_anything_that_can_be_gone_through():
    made = grid(a=range(2), b=(None, "relu"), c=(x for x in [1.5, 2.5]))
    assert len(made) == 8 and made[-1] == {"a": 1, "b": "relu", "c": 2.5}


def test_each_setting_is_a_dict_of_its_own():
    first, second = grid(a=[1, 2])
    first["a"] = 9
    assert second == {"a": 2}


def test_the_best_of_a_table_is_found_with_its_score():
    table = torch.randn(5, 7, dtype=torch.float64)
    settings = grid(i=range(5), j=range(7))
    best, score = grid_search(lambda i, j: table[i, j], settings)
    assert (best["i"], best["j"]) == divmod(table.argmax().item(), 7)
    assert isinstance(score, float) and score == table.max().item()


@pytest.mark.parametrize("settings", [*permutations([{"x": -3}, {"x": 3}, {"x": 1}])])
def test_of_equal_scores_the_first_wins(settings):
    expected = next(s for s in settings if abs(s["x"]) == 3)
    assert grid_search(lambda x: abs(x), settings) == (expected, 3.0)


@pytest.mark.parametrize("place", range(4))
def test_nan_never_wins_wherever_it_comes(place):
    scores = [-5.0, -2.0, -math.inf]
    scores.insert(place, math.nan)
    best, score = grid_search(lambda n: scores[n], grid(n=range(4)))
    assert score == -2.0 and scores[best["n"]] == -2.0


def test_the_worst_score_there_is_still_beats_nan():
    scores = [math.nan, -math.inf]
    assert grid_search(lambda n: scores[n], grid(n=[0, 1])) == ({"n": 1}, -math.inf)


def test_each_setting_is_scored_once_and_in_order():
    seen = []

    def score(n):
        seen.append(n)
        return -n

    best, _ = grid_search(score, (s for s in grid(n=[3, 1, 2])))
    assert seen == [3, 1, 2] and best == {"n": 1}


def test_no_hyperparameter_is_refused(refuses):
    with refuses(
        ValueError, "grid must be given at least one hyperparameter, got none"
    ):
        grid()


def test_a_hyperparameter_without_values_is_refused(refuses):
    with refuses(ValueError, "depth must have at least one value, got none"):
        grid(lr=[0.1], depth=[])


@pytest.mark.parametrize("values", ["adam", 0.1, None])
def test_what_is_no_list_of_values_is_refused(values, refuses):
    with refuses(TypeError, f"optimizer must be a list of values, got {values!r}"):
        grid(lr=[0.1], optimizer=values)


@pytest.fixture
def every_warning():
    # torch warns of a tensor with a graph that becomes a number, but only once.
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_a_score_that_carries_a_graph_is_taken_by_value(every_warning):
    w = torch.tensor(2.0, requires_grad=True)
    best, score = grid_search(lambda n: n * w, grid(n=[1, 3]))
    assert best == {"n": 3} and score == 6.0 and isinstance(score, float)


@pytest.mark.parametrize("settings", [[], [{"n": 0}, {"n": 1}]], ids=len)
def test_nothing_to_choose_from_is_refused(settings, refuses):
    message = "settings must have at least one with a score, got none"
    with refuses(ValueError, message):
        grid_search(lambda n: math.nan, settings)
