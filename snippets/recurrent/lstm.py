"""Long short-term memory (Hochreiter and Schmidhuber, 1997; Gers et al., 2000).

A recurrent network whose memory is changed by adding to it. Gates, numbers between 0
and 1, decide what is kept, what is written and what is shown.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSTM(nn.Module):
    """c_t = f * c_{t-1} + i * g and h_t = o * tanh(c_t); gates from x_t and h_{t-1}.

    Parameters and initialization are those of `nn.LSTM` with one layer, the gates in
    its order i, f, g, o, and a `state_dict` of one loads into the other. The batch
    comes first, as in `nn.LSTM(batch_first=True)`.

    Args:
        input_size: features of a step's input, I.
        hidden_size: features of the cell and of the hidden state, H.
        forget_bias: what is added before the forget gate's sigmoid at the start of the
            training: both of torch's biases together. None draws them as torch does.

    Raises:
        ValueError: a size is below 1.

    Source:
        Hochreiter and Schmidhuber, 1997, "Long Short-Term Memory"; the forget gate is
        from Gers, Schmidhuber and Cummins, 2000, "Learning to Forget".
    """

    def __init__(
        self, input_size: int, hidden_size: int, forget_bias: float | None = None
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(
                "input_size and hidden_size must be at least 1, "
                f"got {input_size} and {hidden_size}"
            )
        self.input_size, self.hidden_size = input_size, hidden_size
        # One matrix for the gates i, f, g, o, below one another: H rows for each.
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if forget_bias is not None:
            rows = slice(hidden_size, 2 * hidden_size)
            nn.init.constant_(self.bias_ih_l0[rows], forget_bias)
            nn.init.zeros_(self.bias_hh_l0[rows])

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Runs over a sequence, one step after another.

        Args:
            x: (B, T, I) with T of at least 1.
            state: h_0 and c_0 from before the first step, (B, H) each; zeros by
                default.

        Returns:
            the hidden states of all steps, (B, T, H), and the pair of the last hidden
            state and the last cell state, (B, H) each.

        Raises:
            ValueError: x, h_0 or c_0 has another shape.
            TypeError: x is not a tensor, but a PackedSequence, say.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got a {type(x).__name__}")
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.input_size:
            raise ValueError(
                f"x must be (B, T, {self.input_size}) with T >= 1, got {tuple(x.shape)}"
            )
        shape = x.shape[0], self.hidden_size
        h, c = (x.new_zeros(shape), x.new_zeros(shape)) if state is None else state
        for name, given in (("h_0", h), ("c_0", c)):
            if given.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(given.shape)}")
        # What the inputs add does not wait for a state: all steps at once.
        from_x = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)  # (B, T, 4H)
        c = c.to(from_x.dtype)  # as nn.LSTM does under autocast
        outputs = []
        for from_x_t in from_x.unbind(dim=1):  # (B, 4H)
            gates = from_x_t + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            i, f, g, o = gates.chunk(4, dim=1)  # (B, H) each
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h, c)  # (B, T, H), (B, H) each
