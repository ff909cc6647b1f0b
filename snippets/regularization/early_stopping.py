"""Early stopping (Prechelt, 1998).

Training ends when the validation metric has not improved for a while, and the weights
go back to where it was best.
"""

import copy
import math

from torch import Tensor, nn


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
        ValueError: patience < 1, min_delta < 0 or not finite, or another mode.
        TypeError: patience is not an int.

    Source:
        Prechelt, 1998, "Early Stopping - But When?"; the patience is that of Goodfellow
        et al., 2016, "Deep Learning", algorithm 7.1.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if type(patience) is not int:
            raise TypeError(f"patience must be an int, got {patience!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be finite and >= 0, got {min_delta}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self.best_state: dict | None = None
        self.num_bad_steps = 0

    def step(self, metric: float | Tensor, model: nn.Module | None = None) -> bool:
        """Takes note of the metric after an epoch.

        Args:
            metric: a number or a 0-d tensor. NaN is no improvement.
            model: whose weights to keep if the metric improved; compiled or not.

        Returns:
            True if training should stop.
        """
        metric = float(metric.detach() if isinstance(metric, Tensor) else metric)
        if self.mode == "min":
            improved = metric < self.best - self.min_delta
        else:
            improved = metric > self.best + self.min_delta
        if improved:
            self.best = metric
            self.num_bad_steps = 0
            # state_dict() refers to the weights themselves, which go on changing.
            state = None if model is None else _raw(model).state_dict()
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
        _raw(model).load_state_dict(self.best_state)

    def state_dict(self) -> dict:
        """All attributes, options too, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on from what state_dict returned; ValueError for other keys."""
        if state_dict.keys() != vars(self).keys():
            raise ValueError(
                f"state_dict must have {list(vars(self))}, got {list(state_dict)}"
            )
        vars(self).update(state_dict)


def _raw(model: nn.Module) -> nn.Module:
    # torch.compile wraps a module, and puts _orig_mod in front of every name.
    return getattr(model, "_orig_mod", model)
