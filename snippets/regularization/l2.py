"""L2 regularization and weight decay (Loshchilov and Hutter, 2019, algorithm 2).

An L2 penalty adds a multiple of each weight to its gradient, which Adam then rescales.
AdamW takes the multiple off the weight itself, past the gradient.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def l2_penalty(parameters: Tensor | Iterable[Tensor], weight_decay: float) -> Tensor:
    """Computes λ/2 times the sum of all squared weights, to be added to the loss.

    Args:
        parameters: one tensor or several, of any shapes.
        weight_decay: λ; the gradient of the penalty is λ times the weight.

    Returns:
        0-d, in float32 or better: a float16 weight above 256 has too large a square.

    Raises:
        ValueError: weight_decay is negative, or there are no parameters.

    Source:
        Loshchilov and Hutter, 2019, 1711.05101, section 2.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:  # as from model.parameters() once an optimizer has used it up
        raise ValueError("parameters must hold a tensor at least, got none")
    wide = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters)
    return weight_decay / 2 * sum(p.square().sum() for p in wide)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; its state_dict is that of `torch.optim.AdamW`.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: learning rate η; decoupled decay shrinks a weight by ηλ of it at a step.
        betas: how much of the running means of g and of g² is kept at a step.
        eps: added to the root that divides the step. In float16 1e-8 is 0: a gradient
            of 0 then makes the weight NaN (0/0), as in torch.
        weight_decay: λ.
        decoupled: False puts λ times the weight into the gradient, as
            `torch.optim.Adam(weight_decay=...)` does.

    Raises:
        ValueError: lr, eps or weight_decay is negative, betas are not two numbers in
            [0, 1), or a group asks for what only torch's has, such as amsgrad.

    Source:
        Loshchilov and Hutter, 2019, 1711.05101, algorithm 2.
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
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "decoupled_weight_decay": decoupled})

    def add_param_group(self, param_group: dict) -> None:
        """Takes more parameters; raises as the class does."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on where it, torch's AdamW or torch's Adam stopped; raises likewise."""
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns what closure returns.

        Raises:
            TypeError: a gradient is sparse or complex.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        _update_(p, p.grad, self.state[p], group)
        return loss


def _check(group: dict) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    for name in ("amsgrad", "maximize", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name} must be False, got {group[name]}")


def _update_(w: Tensor, g: Tensor, state: dict, group: dict) -> None:
    if g.layout != torch.strided or g.is_complex():
        raise TypeError(f"grad must be dense and real, got {g.dtype}, {g.layout}")
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)  # float16 ends at 2048
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
