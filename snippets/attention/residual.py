"""Residual connection (He et al., 2015, section 3.2).

The branch computes only what to add to its input, so that doing nothing is easy to
learn and the gradient has a way around the branch.
"""

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """y = x + F(x), or W_s x + F(x) where the branch changes the shape.

    Args:
        fn: the branch F, a module or a function.
        shortcut: the projection W_s; without it the shortcut is the identity.

    Source:
        He et al., 2015, "Deep Residual Learning", 1512.03385, eq. 1 and 2.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        shortcut: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to the shortcut.

        Args:
            x: whatever fn and shortcut take.

        Returns:
            The sum, of the shape that both have, contiguous.

        Raises:
            ValueError: the branch and the shortcut differ in shape.
            TypeError: one of them is no tensor, as what nn.LSTM returns.
        """
        branch = self.fn(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for name, y in {"fn": branch, "shortcut": shortcut}.items():
            if not isinstance(y, Tensor):
                raise TypeError(f"{name} must return a tensor, got {type(y).__name__}")
        # (4, 8) + (4, 1) would broadcast without a word.
        if branch.shape != shortcut.shape:
            raise ValueError(
                "fn must return the shape of the shortcut, "
                f"{tuple(shortcut.shape)}, got {tuple(branch.shape)}"
            )
        return (shortcut + branch).contiguous()
