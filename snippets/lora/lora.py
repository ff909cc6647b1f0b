"""LoRA, low-rank adaptation (Hu et al., 2021, section 4.1).

A frozen weight gets a second path beside it, two thin matrices, and only these learn.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """h = W_0 x + b + (alpha / r) B A x, with W_0 and b frozen, and B zero at first.

    The `state_dict` says whether the update is merged, so that it is not added twice.

    Args:
        base: the layer to adapt, (..., in) to (..., out). Its parameters are frozen.
        rank: columns of B and rows of A, r.
        alpha: the update is scaled by alpha / r.

    Raises:
        TypeError: base is not an `nn.Linear`.
        ValueError: rank < 1, or alpha is not positive and finite.

    Source:
        Hu et al., 2021, "LoRA: Low-Rank Adaptation", 2106.09685, eq. 3.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        if rank < 1:
            raise ValueError(f"{rank=} must be at least 1")
        if not 0 < alpha < math.inf:
            raise ValueError(f"{alpha=} must be positive and finite")
        self.base = base.requires_grad_(False)
        self.scaling, self.merged = alpha / rank, False
        W = base.weight  # (out, in)
        self.lora_A = nn.Parameter(W.new_zeros(rank, W.shape[1]))  # (r, in)
        self.lora_B = nn.Parameter(W.new_zeros(W.shape[0], rank))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self.merged:
            return self.base(x)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)  # r features between
        return self.base(x) + self.scaling * update

    def delta_weight(self) -> Tensor:
        """(alpha / r) B A, (out, in): the update, at least in float32."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(wide), self.lora_B.to(wide)
        with torch.autocast("cpu" if A.is_meta else A.device.type, enabled=False):
            return self.scaling * (B @ A)  # autocast would round to half precision

    def merge(self) -> None:
        """Adds the update to the weight, in its dtype. A and B learn no more then.

        Raises:
            RuntimeError: it is merged already.
        """
        self._add_to_weight(1, merged=True)

    def unmerge(self) -> None:
        """Takes the update out again, up to rounding.

        Raises:
            RuntimeError: it is not merged.
        """
        self._add_to_weight(-1, merged=False)

    @torch.no_grad()
    def _add_to_weight(self, sign: int, merged: bool) -> None:
        if self.merged == merged:
            raise RuntimeError(f"the update is {'already' if merged else 'not'} merged")
        self.base.weight.copy_(self.base.weight + sign * self.delta_weight())
        self.merged = merged

    def get_extra_state(self) -> Tensor:
        """Whether the update is merged, for the `state_dict`."""
        return torch.tensor(self.merged)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes that from a `state_dict`."""
        self.merged = bool(state)


def inject_lora(
    model: nn.Module, targets: Iterable[str], rank: int = 8, alpha: float = 16.0
) -> list[str]:
    """Freezes a model and wraps the linear layers that are named, in place.

    Args:
        targets: full paths ("layers.0.q_proj"), or what stands last in them ("q_proj").
        rank, alpha: as in `LoRALinear`.

    Returns:
        The paths of the layers that are wrapped.

    Raises:
        ValueError: a target names no layer; rank or alpha as in `LoRALinear`.
        TypeError: a target names something that is no `nn.Linear`.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    layers = dict(model.named_modules(remove_duplicate=False))
    chosen = [n for n in layers if n in targets or n.rpartition(".")[2] in targets]
    found = {*chosen, *(name.rpartition(".")[2] for name in chosen)}
    if missing := [target for target in targets if target not in found]:
        raise ValueError(f"targets must name layers of the model, {missing} do not")
    if wrong := [n for n in chosen if not isinstance(layers[n], nn.Linear)]:
        raise TypeError(f"targets must name nn.Linear layers, {wrong} are none")
    # By layer, not by name: one that stands in several places stays one.
    wrapped = {layers[name]: LoRALinear(layers[name], rank, alpha) for name in chosen}
    for name in chosen:
        model.set_submodule(name, wrapped[layers[name]])
    for name, parameter in model.named_parameters():  # those of earlier calls as well
        parameter.requires_grad = name.endswith(("lora_A", "lora_B"))
    return chosen


def lora_parameter_count(in_features: int, out_features: int, rank: int) -> int:
    """Numbers that LoRA trains beside one weight: r (in + out)."""
    if min(in_features, out_features, rank) < 1:
        raise ValueError(f"{in_features=}, {out_features=}, {rank=} must be at least 1")
    return rank * (in_features + out_features)
