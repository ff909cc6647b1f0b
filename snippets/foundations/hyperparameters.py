"""Searching hyperparameters (Bergstra and Bengio, 2012, JMLR 13).

What training does not learn is chosen by trying: train with each setting, score it on
data that were not trained on, keep the best.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def grid(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    """All combinations of the choices, the last name changing fastest.

    Args:
        choices: for each hyperparameter the values to try, such as lr=[0.1, 0.01].

    Returns:
        A dict for each combination; as many as the product of the numbers of values.

    Raises:
        ValueError: no hyperparameter, or one without values.
        TypeError: the values are none, or a string, to be tried letter by letter.
    """
    if not choices:
        raise ValueError("grid must be given at least one hyperparameter, got none")
    columns = []
    for name, values in choices.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name} must be a list of values, got {values!r}")
        columns.append([(name, value) for value in values])
        if not columns[-1]:
            raise ValueError(f"{name} must have at least one value, got none")
    return [dict(row) for row in itertools.product(*columns)]


def grid_search(
    score: Callable[..., float | Tensor], settings: Iterable[dict[str, Any]]
) -> tuple[dict[str, Any], float]:
    """The setting with the highest score; of equal ones, the first.

    Args:
        score: is called as score(**setting) and returns a number, higher is better. It
            has to measure on validation data. NaN, as of a training that diverged, is
            never the best.
        settings: a grid, or any other settings: drawn at random, it is random search.

    Returns:
        The best setting and its score.

    Raises:
        ValueError: there are no settings, or every score is NaN.

    Source:
        Bergstra and Bengio, 2012, "Random Search for Hyper-Parameter Optimization".
    """
    best, best_score = None, math.nan
    for setting in settings:
        found = score(**setting)
        found = float(found.detach() if isinstance(found, Tensor) else found)
        # NaN > x and x > NaN are both false: max() would keep a NaN that comes first.
        if found > best_score or (best is None and not math.isnan(found)):
            best, best_score = setting, found
    if best is None:
        raise ValueError("settings must have at least one with a score, got none")
    return best, best_score
