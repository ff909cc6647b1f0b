"""Expert parallelism (Lepikhin et al., 2020, 2006.16668, section 3).

Each process holds a few of the experts of a layer. Tokens travel to the experts that
they chose, and the answers travel back.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertParallelMoE(nn.Module):
    """A mixture of experts that is spread over the W ranks of a group.

    Rank r holds the experts r * E/W to (r + 1) * E/W - 1, under the names that they
    have in one process. Building, calling and going backward take all ranks at once.

    Where the losses of the ranks add up to the batch's, gradients of the experts are
    complete. Those of the router, which all ranks have, must be summed over the ranks.

    Args:
        d_model, d_hidden: features of a token; hidden features of an expert.
        num_experts, top_k: E, a multiple of W; how many experts a token chooses, k.
        group: the ranks, all by default.
        renormalize: True: softmax over the k chosen logits. False: over all E.

    Raises:
        ValueError: a size is below 1, top_k is not in 1..E, or E is no multiple of W.
        RuntimeError: there is no process group, or this process is not in it.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        group: dist.ProcessGroup | None = None,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "d_model": d_model, "d_hidden": d_hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in 1..{num_experts}, got {top_k}")
        if group is None and not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group first")
        rank, W = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise RuntimeError("group must include this process, got one that does not")
        if num_experts % W:
            raise ValueError(f"{num_experts=} must be a multiple of {W} ranks")
        self.group, self.top_k, self.renormalize = group, top_k, renormalize
        d, h = d_model, d_hidden
        gate = nn.Linear(d, num_experts, bias=False)
        dist.broadcast(gate.weight.detach(), group=group, group_src=0)
        self.router, self.experts = nn.ModuleDict({"gate": gate}), nn.ModuleDict()
        for i in range(num_experts):
            # Drawn on all ranks, or with one seed all ranks would have the same few.
            expert = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d))
            if i * W // num_experts == rank:
                self.experts[str(i)] = expert

    @classmethod
    def from_layer(cls, moe_layer: nn.Module, group: object = None) -> nn.Module:
        """Copies this rank's share of a layer that all ranks have; raises as above."""
        router, first = moe_layer.router, moe_layer.experts[0][0]
        if router.noise is not None:
            raise ValueError("moe_layer must have noisy=False, got noisy=True")
        sizes = first.in_features, first.out_features, len(moe_layer.experts)
        layer = cls(*sizes, router.top_k, group, router.renormalize).to(first.weight)
        weights = moe_layer.state_dict()
        layer.load_state_dict({name: weights[name] for name in layer.state_dict()})
        return layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Has this rank's tokens, x (..., d_model), computed where their experts are.

        Returns:
            output (..., d_model), in the dtype that the experts return; logits (N, E),
            in float32 or better. N may differ between ranks and may be 0.
        """
        gate, k = self.router["gate"].weight, self.top_k
        if x.shape[-1:] != gate.shape[1:]:
            raise ValueError(f"x must be (..., {gate.shape[1]}), got {tuple(x.shape)}")
        tokens = x.reshape(-1, x.shape[-1])  # (N, d_model)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(tokens.to(wide), gate.to(wide))  # (N, E)
            ranked, order = logits.sort(descending=True, stable=True)
            pool = ranked[:, :k] if self.renormalize else ranked
            weights = pool.softmax(dim=1)[:, :k]  # (N, k)
        chosen = order[:, :k].flatten()  # (N k,)

        # Sorted by expert, visits are sorted by rank. First the ranks tell how many.
        visits = chosen.argsort()  # (N k,)
        leaving = chosen.bincount(minlength=len(gate)).view(-1, len(self.experts))
        coming = torch.empty_like(leaving)  # (W, E/W): from each rank to each of mine
        dist.all_to_all_single(coming, leaving, group=self.group)
        sizes = leaving.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
        guests = _AllToAll.apply(tokens[visits // k], sizes, self.group)  # (M, d_model)

        # They come by rank and then by expert; an expert takes those of all ranks.
        host = torch.ones_like(coming).cumsum(dim=1).flatten()  # (E,): 1..E/W, W times
        sort = host.repeat_interleave(coming.flatten()).argsort()  # (M,)
        rows = iter(guests[sort].split(coming.sum(dim=0).tolist()))
        # Without guests an expert is called, too: going backward takes all ranks.
        found = torch.cat([expert(next(rows)) for expert in self.experts.values()])
        found = _AllToAll.apply(
            found[sort.argsort()], sizes[::-1], self.group
        )  # (N k, d_model)
        found = found[visits.argsort()].unflatten(0, weights.shape)  # (N, k, d_model)
        output = (weights[..., None] * found).sum(dim=1).to(found.dtype)
        return output.reshape(x.shape), logits


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, sizes: tuple, group: object) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        found = x.new_empty(sum(sizes[1]), x.shape[1])
        dist.all_to_all_single(found, x.contiguous(), *sizes[::-1], group=group)
        return found

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        return _AllToAll.apply(grad, ctx.sizes[::-1], ctx.group), None, None
