"""Affine layer with the initialization of `nn.Linear` (He et al., 2015, section 2.2).

The weight is drawn by a function named after Kaiming He, with a gain that makes its
variance a sixth of what He derived for ReLU networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kaiming_uniform_bound(fan_in: int, a: float = 0.0) -> float:
    """Bound b such that U(-b, b) has the variance 2 / ((1 + a^2) fan_in).

    Behind a leaky ReLU of slope a, weights of this variance keep the mean square of the
    activations from layer to layer.

    Args:
        fan_in: number of inputs that one output adds up.
        a: slope of the leaky ReLU for negative inputs; 0 is a ReLU, 1 no activation.

    Raises:
        ValueError: fan_in is below 1.

    Source:
        He et al., 2015, "Delving Deep into Rectifiers", equations 10 and 15.
    """
    if not fan_in >= 1:
        raise ValueError(f"fan_in must be at least 1, got {fan_in}")
    return math.sqrt(6 / ((1 + a**2) * fan_in))  # a uniform has the variance b^2 / 3


class Linear(nn.Module):
    """y = x W^T + b, with the parameters, names and first values of `nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: False leaves b out.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                "in_features and out_features must be at least 1, "
                f"got {in_features} and {out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias from U(-b, b) with b = 1 / sqrt(in_features)."""
        bound = kaiming_uniform_bound(self.in_features, a=math.sqrt(5))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            ValueError: the last dimension of x is not in_features.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"x must be (..., {self.in_features}), got {tuple(x.shape)}"
            )
        return F.linear(x, self.weight, self.bias)
