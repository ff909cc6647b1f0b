"""L2 regularization and weight decay (Loshchilov and Hutter, 2019, algorithm 2).

An L2 penalty adds a multiple of each weight to its gradient, which Adam then rescales.
AdamW takes the multiple off the weight itself, past the gradient.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def l2_penalty(parameters: Tensor | Iterable[Tensor], weight_decay: float) -> Tensor:
    """Computes weight_decay / 2 * sum of w², to be added to the loss.

    Args:
        parameters: one tensor or several, of any shapes.
        weight_decay: the coefficient; the gradient of the penalty is weight_decay * w.

    Returns:
        The penalty, 0-d, in float32 or better.

    Raises:
        ValueError: weight_decay is negative, or there are no parameters.

    Source:
        Loshchilov and Hutter, 2019, 1711.05101, section 2.
    """
    _not_negative(weight_decay=weight_decay)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:
        # As from model.parameters() once an optimizer has used it up
        raise ValueError("parameters must hold a tensor at least, got none")
    # float16 overflows where a weight is above 256: square in float32.
    wide = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters)
    return weight_decay / 2 * sum(p.square().sum() for p in wide)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; its state_dict is that of `torch.optim.AdamW`.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: the step size; decoupled decay shrinks a weight by lr * weight_decay.
        betas: how much of the running means of g and of g² is kept at a step.
        eps: added to the root that divides the step.
        weight_decay: the coefficient of the weights.
        decoupled: False puts weight_decay * w into the gradient, as
            `torch.optim.Adam(weight_decay=...)` does.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is outside [0, 1).

    Source:
        Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization",
        1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decoupled: bool = True,
    ) -> None:
        _not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "decoupled_weight_decay": decoupled})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What closure returns.

        Raises:
            TypeError: a gradient is sparse or complex.
        """
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        _update_(p, p.grad, self.state[p], group)
        return loss


def _update_(w: Tensor, g: Tensor, state: dict, group: dict) -> None:
    if g.layout != torch.strided or g.is_complex():
        raise TypeError(
            f"gradients must be dense and real, got {g.dtype} and {g.layout}"
        )
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
    state["step"] += 1
    m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()

    if group["decoupled_weight_decay"]:
        w.mul_(1 - lr * group["weight_decay"])
    else:
        g = g + group["weight_decay"] * w
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v / (1 - beta2**t)).sqrt()  # both means start at 0: undo that bias
    w.addcdiv_(m, root + group["eps"], value=-lr / (1 - beta1**t))


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
