"""Recurrent neural network (Elman, 1990), with the initialization of Le et al. (2015).

The same small network runs at every step of a sequence. It sees the step's input and
its own last state, and returns the next one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RNN(nn.Module):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Parameters and initialization are those of `nn.RNN` with one layer, and a
    `state_dict` of one loads into the other. The batch comes first, as in
    `nn.RNN(batch_first=True)`.

    Args:
        input_size: features of a step's input, I.
        hidden_size: features of the state, H.
        nonlinearity: "tanh" or "relu".

    Raises:
        ValueError: a size is below 1, or the nonlinearity is another.

    Source:
        Elman, 1990, "Finding Structure in Time".
    """

    def __init__(
        self, input_size: int, hidden_size: int, nonlinearity: str = "tanh"
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(
                "input_size and hidden_size must be at least 1, "
                f"got {input_size} and {hidden_size}"
            )
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}"
            )
        self.input_size, self.hidden_size = input_size, hidden_size
        self.nonlinearity = nonlinearity
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(hidden_size))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs over a sequence, one step after another.

        Args:
            x: (B, T, I) with T of at least 1.
            h_0: the state before the first step, (B, H); zeros by default.

        Returns:
            the states of all steps, (B, T, H), and the last one, (B, H).

        Raises:
            ValueError: x or h_0 has another shape.
            TypeError: x is not a tensor, but a PackedSequence, say.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got a {type(x).__name__}")
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.input_size:
            raise ValueError(
                f"x must be (B, T, {self.input_size}) with T >= 1, got {tuple(x.shape)}"
            )
        shape = x.shape[0], self.hidden_size
        h = x.new_zeros(shape) if h_0 is None else h_0
        if h.shape != shape:
            raise ValueError(f"h_0 must be {shape}, got {tuple(h.shape)}")
        activation = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        # What the inputs add does not wait for a state: all steps at once.
        from_x = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)  # (B, T, H)
        outputs = []
        for from_x_t in from_x.unbind(dim=1):  # (B, H)
            h = activation(from_x_t + F.linear(h, self.weight_hh_l0, self.bias_hh_l0))
            outputs.append(h)
        return torch.stack(outputs, dim=1), h  # (B, T, H), (B, H)


def irnn_init_(rnn: nn.Module, scale: float = 1.0) -> nn.Module:
    """Makes each recurrent matrix scale times the identity and each bias zero.

    At scale 1 a ReLU network then copies its state and adds the input to it.

    Args:
        rnn: an `RNN`, or an `nn.RNN` of any number of layers; changed and returned.
        scale: what the identity is multiplied by.

    Raises:
        ValueError: rnn has no recurrent matrix, or one that is not square.

    Source:
        Le et al., 2015, "A Simple Way to Initialize Recurrent Networks of Rectified
        Linear Units", 1504.00941.
    """
    recurrent = [p for name, p in rnn.named_parameters() if "weight_hh" in name]
    shapes = [tuple(p.shape) for p in recurrent]
    if not shapes or any(rows != columns for rows, columns in shapes):
        raise ValueError(f"rnn must have square recurrent matrices, got {shapes}")
    with torch.no_grad():
        for weight in recurrent:
            nn.init.eye_(weight).mul_(scale)
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                parameter.zero_()
    return rnn
