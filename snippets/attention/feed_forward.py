"""Position-wise feed-forward network (Vaswani et al., 2017, section 3.3).

The same two linear maps, with a non-linearity between them, act on every token by
itself: no token sees another.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class PositionwiseFeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2.

    Args:
        d_model: features of a token.
        d_ff: features of the hidden layer, 4 * d_model by default.
        dropout: probability of dropping a hidden feature, as in
            `nn.TransformerEncoderLayer`. (The paper drops features of the output.)
        activation: the non-linearity, element by element.

    Raises:
        ValueError: d_model < 1, d_ff < 1, or dropout outside [0, 1].

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, eq. 2.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        if d_model < 1 or d_ff < 1:
            raise ValueError(
                f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}"
            )
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each token.

        Args:
            x: (..., d_model).

        Returns:
            (..., d_model).

        Raises:
            ValueError: the last dimension of x is not d_model.
        """
        if x.shape[-1:] != (self.linear1.in_features,):
            raise ValueError(
                f"x must be (..., {self.linear1.in_features}), got {tuple(x.shape)}"
            )
        hidden = self.activation(self.linear1(x))  # (..., d_ff)
        return self.linear2(self.dropout(hidden))  # (..., d_model)
