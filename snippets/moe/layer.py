"""Sparse mixture of experts (Shazeer et al., 2017, 1701.06538, equations 1 to 5).

A router chooses k of E small networks for each token. Only these compute it, and the
output is the sum of what they return, weighted by the router.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopKRouter(nn.Module):
    """Chooses k of E experts for each token, and how much each counts (eq. 3 to 5).

    Args:
        d_model: features of a token.
        num_experts, top_k: E and k.
        noisy: add noise of a learned size to the logits, in training only (eq. 4).
        renormalize: True: softmax over the k chosen logits. False: over all E, as in
            Switch (2101.03961); with top_k = 1 only this lets the task train the gate.

    Raises:
        ValueError: a size is below 1, or top_k is not in 1..E.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        noisy: bool = False,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        _check(num_experts, top_k, d_model=d_model)
        self.top_k, self.renormalize = top_k, renormalize
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.noise = nn.Linear(d_model, num_experts, bias=False) if noisy else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routes the tokens x (N, d_model).

        Returns:
            logits (N, E), with the noise if there is any; weights (N, k), the largest
            first; indices (N, k). Of equal logits the lower index comes first. Logits
            and weights are float32 or better, under autocast too.

        Raises:
            ValueError, TypeError: x has another shape, or its elements are no floats.
        """
        if x.shape[1:] != (d_model := self.gate.in_features,):
            raise ValueError(f"x must be (N, {d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be a float tensor, got {x.dtype}")
        # Rounded to bfloat16, different logits are equal: another expert is chosen.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            logits = F.linear(x, self.gate.weight.to(x.dtype))  # (N, E)
            if self.noise is not None and self.training:
                size = F.softplus(F.linear(x, self.noise.weight.to(x.dtype)))
                logits = logits + size * torch.randn_like(logits)
            # A stable sort, because torch.topk may take any of several equal logits.
            ranked, order = logits.sort(descending=True, stable=True)  # (N, E)
            pool = ranked[:, : self.top_k] if self.renormalize else ranked
            weights = pool.softmax(dim=1)[:, : self.top_k]  # (N, k)
        return logits, weights.contiguous(), order[:, : self.top_k].contiguous()


class MoELayer(nn.Module):
    """y = sum over the chosen experts i of weight_i * expert_i(x).

    Arguments and errors: those of `TopKRouter`; experts have d_hidden hidden features.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        noisy: bool = False,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        _check(num_experts, top_k, d_hidden=d_hidden)
        self.router = TopKRouter(d_model, num_experts, top_k, noisy, renormalize)
        d, h = d_model, d_hidden
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sends each of N tokens, x (..., d_model), to its experts.

        Returns:
            output (..., d_model), in the dtype that the experts return; logits (N, E).
            Experts without tokens run on 0 rows, so that one graph serves all routes;
            their gradients are zeros, not None.
        """
        if x.shape[-1:] != (d_model := self.router.gate.in_features,):
            raise ValueError(f"x must be (..., {d_model}), got {tuple(x.shape)}")
        tokens = x.reshape(-1, d_model)  # (N, d_model)
        logits, weights, indices = self.router(tokens)
        # Sorted by expert, the N * k visits are one piece for each of them.
        visits = indices.flatten().argsort()  # (N * k,)
        counts = F.one_hot(indices, len(self.experts)).sum(dim=(0, 1)).tolist()
        parts = tokens[visits // self.router.top_k].split(counts)
        found = torch.cat([self.experts[i](part) for i, part in enumerate(parts)])
        found = found[visits.argsort()].unflatten(0, indices.shape)  # (N, k, d_model)
        output = (weights[..., None] * found).sum(dim=1).to(found.dtype)
        return output.reshape(x.shape), logits


def moe_parameter_counts(
    d_model: int, d_hidden: int, num_experts: int, top_k: int
) -> tuple[int, int]:
    """Counts a layer's parameters (noisy=False): all, and those that one token uses."""
    _check(num_experts, top_k, d_model=d_model, d_hidden=d_hidden)
    expert = d_hidden * (d_model + 1) + d_model * (d_hidden + 1)
    return tuple(d_model * num_experts + n * expert for n in (num_experts, top_k))


def _check(num_experts: int, top_k: int, **sizes: int) -> None:
    for name, size in {"num_experts": num_experts, **sizes}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts}, got {top_k}")
