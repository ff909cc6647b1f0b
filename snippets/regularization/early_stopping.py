"""Early stopping (Prechelt, 1998).

Training ends when the validation metric has not improved for a while, and the weights
go back to where it was best.
"""

import copy
import math

from torch import nn


class EarlyStopping:
    """Watches a validation metric and keeps the weights of its best moment.

    Args:
        patience: how many steps in a row may bring no improvement; the last of them
            stops.
        min_delta: what a step must gain, strictly, to count as an improvement.
        mode: "min" if lower is better, "max" if higher is.

    Attributes:
        best: the best metric so far; infinitely bad before there is one.
        best_state: a deep copy of the state_dict of that moment, or None.
        num_bad_steps: steps since the last improvement.

    Raises:
        ValueError: patience < 1, min_delta < 0, or another mode.

    Source:
        Prechelt, 1998, "Early Stopping - But When?"; the patience is that of Goodfellow
        et al., 2016, "Deep Learning", algorithm 7.1.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self.best_state: dict | None = None
        self.num_bad_steps = 0

    def step(self, metric: float, model: nn.Module | None = None) -> bool:
        """Takes note of the metric after an epoch.

        Args:
            metric: a number or a 0-d tensor. NaN is no improvement.
            model: whose weights to keep if the metric improved.

        Returns:
            True if training should stop.
        """
        metric = float(metric)
        if self.mode == "min":
            improved = metric < self.best - self.min_delta
        else:
            improved = metric > self.best + self.min_delta
        if improved:
            self.best = metric
            self.num_bad_steps = 0
            # state_dict() refers to the weights themselves, which go on changing.
            state = None if model is None else model.state_dict()
            self.best_state = copy.deepcopy(state)
        else:
            self.num_bad_steps += 1
        return self.num_bad_steps >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Gives the model its best weights back.

        Args:
            model: the module that step was given, or one like it.

        Raises:
            RuntimeError: no weights were kept at the best step.
        """
        if self.best_state is None:
            raise RuntimeError("restore needs a step that improved and had the model")
        model.load_state_dict(self.best_state)
