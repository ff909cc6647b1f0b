"""Temperature, in sampling and calibration (Guo et al., 2017, 1706.04599, eq. 3, 9).

Set by hand it makes samples random, fitted it makes a classifier as sure as right.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn


def softmax_with_temperature(
    logits: Tensor, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """softmax(logits / temperature), in float32 at least (Hinton et al., 2015, eq. 1).

    Raises:
        ValueError: temperature is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"{temperature=} must be positive and finite")
    # Less the largest: divided by a small temperature it would be infinite.
    shifted = _wide(logits) - _wide(logits).amax(dim, keepdim=True).detach()
    return torch.softmax(shifted / temperature, dim)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from logits (..., V): temperature first, then top-k, then top-p.

    Args:
        temperature: 0 takes the most likely token, the first of equals.
        top_k: only the k most likely tokens, the first of equals; all, if above V.
        top_p: only the fewest tokens that hold this share of what top-k left
            (Holtzman et al., 2020, 1904.09751, section 3.1). One always stays.

    Raises:
        ValueError: temperature negative or infinite, top_k < 1, top_p outside (0, 1].
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must be in (0, 1]")
    if temperature == 0:
        return logits.argmax(dim=-1)  # (...)
    probs = softmax_with_temperature(logits, temperature)  # (..., V)
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    probs = probs[..., :top_k]  # (..., K)
    if top_p is not None and top_p < 1:
        probs = probs / probs.sum(dim=-1, keepdim=True)
        probs = probs.where(probs.cumsum(dim=-1) - probs < top_p, 0)  # before it
    rows = probs.reshape(-1, probs.shape[-1])  # (N, K)
    drawn = torch.multinomial(rows, 1, generator=generator).view(*ids.shape[:-1], 1)
    return ids.gather(-1, drawn).squeeze(-1)  # (...)


class TemperatureScaler(nn.Module):
    """One number, 1 until `fit`, that makes a classifier as sure as it is right."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def fit(self, logits: Tensor, labels: Tensor, max_iter: int = 100) -> Self:
        """Minimizes the cross-entropy on held-out logits (N, V) and labels (N,).

        Raises:
            ValueError: wrong shapes, no examples, or the best temperature would be 0
                (all labels are predicted) or infinite (logits don't tell of labels).
        """
        _check(logits, labels, "logits")
        z = logits.detach().double()
        truth = z.gather(1, labels[:, None])[:, 0]  # (N,)
        if truth.equal(z.amax(dim=1)) or truth.mean() <= z.mean():
            raise ValueError("labels are all predicted, or not at all: nothing to fit")

        def falls(inverse: float) -> bool:
            return (z * (z * inverse).softmax(dim=1)).sum(1).mean() < truth.mean()

        low, high = -64.0, 64.0  # powers of 2; the loss is convex in 1 / temperature
        for _ in range(max_iter):
            middle = (low + high) / 2
            low, high = (middle, high) if falls(2.0**middle) else (low, middle)
        self.temperature.fill_(2.0**-low)
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """logits / temperature, in float32 at least."""
        return _wide(logits) / self.temperature


def expected_calibration_error(
    probs: Tensor, labels: Tensor, num_bins: int = 15
) -> Tensor:
    """|accuracy - confidence| of the bins (l, u], weighted by share (Guo's eq. 3).

    Args:
        probs: (N, V); the largest of a row is its confidence. Labels are (N,), int64.

    Raises:
        ValueError: wrong shapes, no examples, rows that do not sum to 1, num_bins < 1.
    """
    _check(probs, labels, "probs")
    if num_bins < 1:
        raise ValueError(f"{num_bins=} must be at least 1")
    if (_wide(probs).sum(dim=1) - 1).abs().max() > 0.01 or probs.min() < 0:
        raise ValueError("probs must be rows of probabilities that sum to 1")
    confidence, predicted = _wide(probs).max(dim=1)  # (N,)
    edges = torch.arange(1, num_bins).to(confidence) / num_bins
    bins = torch.bucketize(confidence, edges)  # (N,)
    gaps = (predicted == labels).to(confidence) - confidence
    return gaps.new_zeros(num_bins).index_add(0, bins, gaps).abs().sum() / len(labels)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(rows: Tensor, labels: Tensor, name: str) -> None:
    got = tuple(rows.shape), tuple(labels.shape)
    if rows.dim() != 2 or got[1] != got[0][:1] or not rows.numel():
        raise ValueError(f"{name} and labels must be (N, V) and (N,), got {got}")
