"""Experts spread over processes against the layer in one process."""

import os
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from snippets.moe.expert_parallel import ExpertParallelMoE
from snippets.moe.layer import MoELayer

ROOT = Path(__file__).resolve().parents[2]
AGAINST = "MoELayer in one process"
SHORT = timedelta(seconds=10)


def run(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=SHORT,
    )
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def next_rank(index, *arguments):
    run(index + 1, *arguments)


def on_ranks(world_size, function, *arguments):
    """What function(rank, *arguments) returns in each of so many processes.

    Rank 0 is this process: coverage and mutation tests see what it runs.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Python 3.12 warns of every fork of a process that has threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        given = world_size, folder, function, arguments
        others = mp.start_processes(
            next_rank, given, world_size - 1, join=False, start_method="fork"
        )
        try:
            run(0, *given)
            while not others.join():
                pass
        finally:
            for process in others.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}") for rank in range(world_size)]


@pytest.fixture
def alone():
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def everything(layer, x, arriving):
    """Output, logits and all gradients, for gradients that arrive at the first two."""
    x = x.detach().clone().requires_grad_()
    outputs = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(outputs, [x, *parameters], arriving)
    of_x, *gradients = (gradient.detach() for gradient in gradients)
    found = dict(zip(names, gradients, strict=True))
    return *(y.detach() for y in outputs), of_x, found


def share(rank, layer, batches, arriving):
    sharded = ExpertParallelMoE.from_layer(layer)
    return everything(sharded, batches[rank], arriving[rank])


def joined(results):
    """The ranks' results as one: the router's gradients are summed."""
    outputs, logits, inputs, gradients = zip(*results, strict=True)
    found = {name: g for of_rank in gradients for name, g in of_rank.items()}
    gate = "router.gate.weight"
    found[gate] = torch.stack([of_rank[gate] for of_rank in gradients]).sum(0)
    return torch.cat(outputs), torch.cat(logits), torch.cat(inputs), found


def compare(results, layer, batches, arriving, agrees, atol, rtol=0):
    arriving = [torch.cat(parts) for parts in zip(*arriving, strict=True)]
    *expected, grads = everything(layer, torch.cat(batches), arriving)
    *found, found_grads = joined(results)
    assert found_grads.keys() == grads.keys()
    found += [found_grads[name] for name in grads]
    for x, y in zip(found, [*expected, *grads.values()], strict=True):
        agrees(x, y, AGAINST, atol, rtol)


def setting(sizes, E, k, randomize, dtype=torch.float64, renormalize=True):
    layer = randomize(MoELayer(4, 6, E, k, renormalize=renormalize)).to(dtype)
    batches = [torch.randn(N, 4, dtype=dtype) for N in sizes]
    wide = torch.promote_types(dtype, torch.float32)
    arriving = [
        (torch.randn(N, 4, dtype=dtype), torch.randn(N, E, dtype=wide)) for N in sizes
    ]
    return layer, batches, arriving


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("E", "k"), [(1, 1), (5, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("N", [7, 1, 0])
def test_one_rank_gives_the_values_and_gradients_of_the_layer(
    N, E, k, renormalize, alone, randomize, agrees
):
    case = setting([N], E, k, randomize, renormalize=renormalize)
    compare([share(0, *case)], *case, agrees, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes", [(5, 5), (7, 3), (0, 6), (6, 0), (0, 0), (1, 1), (4, 1, 6), (2, 0, 3)]
)
def test_several_ranks_give_the_values_and_gradients_of_the_layer(
    sizes, k, randomize, agrees
):
    case = setting(sizes, 6, k, randomize)
    compare(on_ranks(len(sizes), share, *case), *case, agrees, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.float32, 1e-5, 0), (torch.bfloat16, 3e-2, 3e-2)],
)
def test_lower_precisions_are_as_exact_as_they_can_be(
    dtype, atol, rtol, randomize, agrees
):
    case = setting((7, 4), 4, 2, randomize, dtype)
    compare(on_ranks(2, share, *case), *case, agrees, atol=atol, rtol=rtol)


def test_weights_of_all_experts_travel_too(randomize, agrees):
    case = setting((4, 3), 4, 1, randomize, renormalize=False)
    compare(on_ranks(2, share, *case), *case, agrees, atol=1e-12)


def test_a_rank_whose_experts_nobody_chose_takes_part_all_the_same(randomize, agrees):
    layer, batches, arriving = setting((5, 3), 4, 2, randomize)
    with torch.no_grad():
        layer.router.gate.weight[:2] = 0
        layer.router.gate.weight[2:] = 1 + torch.rand(2, 4)
    batches = [batch.abs() for batch in batches]
    results = on_ranks(2, share, layer, batches, arriving)
    compare(results, layer, batches, arriving, agrees, atol=1e-12)
    assert results[0][3]["experts.0.0.weight"].abs().max() == 0
    assert results[1][3]["experts.3.0.weight"].abs().max() > 0


def pairs(rank, layer, batches, arriving):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    sharded = ExpertParallelMoE.from_layer(layer, groups[rank % 2])
    return everything(sharded, batches[rank], arriving[rank])


def test_a_group_of_some_ranks_is_a_layer_of_its_own(randomize, agrees):
    layer, batches, arriving = setting((2, 3, 1, 4), 4, 2, randomize)
    results = on_ranks(4, pairs, layer, batches, arriving)
    for n in (0, 1):
        mine = batches[n::2], arriving[n::2]
        compare(results[n::2], layer, *mine, agrees, atol=1e-12)


def built(rank, seeds):
    torch.manual_seed(seeds[rank])
    return dict(ExpertParallelMoE(4, 6, 4, 2).state_dict())


def test_one_seed_draws_the_weights_of_the_layer_in_one_process():
    parts = on_ranks(2, built, (0, 0))
    torch.manual_seed(0)
    layer = MoELayer(4, 6, 4, 2).state_dict()
    own = [{name.split(".")[1] for name in part} - {"gate"} for part in parts]
    assert own == [{"0", "1"}, {"2", "3"}]
    for part in parts:
        assert all(torch.equal(value, layer[name]) for name, value in part.items())
    assert {name for part in parts for name in part} == set(layer)


def test_with_other_seeds_the_router_is_still_that_of_the_first_rank():
    first, second = on_ranks(2, built, (1, 2))
    torch.manual_seed(1)
    gate = MoELayer(4, 6, 4, 2).router.gate.weight
    for part in (first, second):
        assert torch.equal(part["router.gate.weight"], gate)
    assert not torch.equal(first["experts.0.0.weight"], second["experts.2.0.weight"])


def built_in_pairs(rank):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(rank)
    return ExpertParallelMoE(4, 6, 4, 2, groups[rank % 2]).state_dict()


def test_in_a_group_the_router_is_that_of_its_first_rank():
    gates = [state["router.gate.weight"] for state in on_ranks(4, built_in_pairs)]
    for rank, gate in enumerate(gates):
        torch.manual_seed(rank % 2)
        assert torch.equal(gate, MoELayer(4, 6, 4, 2).router.gate.weight)


def trained(rank, layer, batches, targets):
    """Three steps of gradient descent on the squared error of the whole batch."""
    sharded = ExpertParallelMoE.from_layer(layer)
    total = sum(map(len, batches))
    for _ in range(3):
        out, _ = sharded(batches[rank])
        loss = (out - targets[rank]).square().sum() / total
        sharded.zero_grad()
        loss.backward()
        dist.all_reduce(sharded.router["gate"].weight.grad)
        with torch.no_grad():
            for p in sharded.parameters():
                p -= 0.1 * p.grad
    return dict(sharded.state_dict())


def test_training_goes_where_it_goes_in_one_process(randomize, agrees):
    layer, batches, arriving = setting((5, 2), 4, 2, randomize)
    targets = [first for first, _ in arriving]
    parts = on_ranks(2, trained, layer, batches, targets)
    for _ in range(3):
        out, _ = layer(torch.cat(batches))
        layer.zero_grad()
        (out - torch.cat(targets)).square().sum().div(7).backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.1 * p.grad
    for part in parts:
        for name, value in part.items():
            agrees(value, layer.state_dict()[name], AGAINST, atol=1e-12)


def second_derivatives(rank, layer, batches):
    sharded = ExpertParallelMoE.from_layer(layer)
    x = batches[rank].clone().requires_grad_()
    (slope,) = torch.autograd.grad(sharded(x)[0].pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


def test_gradients_of_gradients_are_those_of_the_layer(randomize, agrees):
    layer, batches, _ = setting((5, 3), 4, 2, randomize)
    found = torch.cat(on_ranks(2, second_derivatives, layer, batches))
    x = torch.cat(batches).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x)[0].pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), x)
    agrees(found, expected, AGAINST, atol=1e-9, rtol=1e-9)


def shapes(rank, layer, x):
    return [part.detach() for part in ExpertParallelMoE.from_layer(layer)(x)]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 0, 4)], ids=str)
def test_any_leading_dimensions_do(shape, alone, randomize, agrees):
    layer = randomize(MoELayer(4, 6, 5, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)
    for found, expected in zip(shapes(0, layer, x), layer(x), strict=True):
        agrees(found, expected.detach(), AGAINST, atol=1e-12)
        assert found.is_contiguous()


def test_non_contiguous_tokens_work(alone, randomize, agrees):
    layer = randomize(MoELayer(4, 6, 5, 2)).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    out, _ = shapes(0, layer, x)
    agrees(out, layer(x)[0].detach(), AGAINST, atol=1e-12)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_router_in_float32(dtype, alone, randomize, agrees):
    layer = randomize(MoELayer(4, 6, 5, 2))
    x = torch.randn(50, 4)
    sharded = ExpertParallelMoE.from_layer(layer)
    with torch.autocast("cpu", dtype):
        out, logits = sharded(x)
        expected, expected_logits = layer(x)
    assert out.dtype == dtype and logits.dtype == torch.float32
    exact = x.double() @ layer.router.gate.weight.double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)
    agrees(logits, expected_logits, AGAINST, atol=0)
    # Half a unit in the last of 8 or 11 bits, of sums of some twenty products
    agrees(out, expected, AGAINST, atol=2e-2, rtol=2e-2)


def test_float16_and_bfloat16_weights_route_as_in_float32(alone, randomize):
    layer = randomize(MoELayer(4, 6, 5, 2)).bfloat16()
    x = torch.randn(50, 4).bfloat16()
    out, logits = shapes(0, layer, x)
    exact = x.double() @ layer.router.gate.weight.double().T
    assert out.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)


def test_of_equal_logits_the_lower_index_is_chosen(alone):
    layer = MoELayer(2, 3, 20, 2)
    nn.init.zeros_(layer.router.gate.weight)
    x = torch.ones(3, 2)
    sharded = ExpertParallelMoE.from_layer(layer)
    sharded(x)[0].sum().backward()
    used = [i for i, f in sharded.experts.items() if f[2].bias.grad.abs().max() > 0]
    assert used == ["0", "1"]


def test_the_router_alone_gives_no_gradient_to_the_experts(alone, randomize):
    sharded = ExpertParallelMoE.from_layer(randomize(MoELayer(4, 6, 5, 2)))
    _, logits = sharded(torch.randn(3, 4))
    logits.sum().backward()
    assert all(p.grad is None for p in sharded.experts.parameters())


def test_weights_are_copies_on_the_device_and_of_the_dtype_of_the_layer(alone):
    layer = MoELayer(4, 6, 5, 2, renormalize=False).double()
    sharded = ExpertParallelMoE.from_layer(layer)
    assert sharded.top_k == 2 and sharded.renormalize is False
    state, copies = layer.state_dict(), sharded.state_dict()
    assert state.keys() == copies.keys()
    for name, value in copies.items():
        assert torch.equal(value, state[name]) and value.dtype == torch.float64
        assert value.data_ptr() != state[name].data_ptr()


def test_weights_are_renormalized_unless_told_otherwise(alone):
    assert ExpertParallelMoE(4, 6, 5, 2).renormalize is True


def test_what_a_state_dict_lacks_or_has_too_much_is_no_secret(alone):
    sharded = ExpertParallelMoE(4, 6, 2, 1)
    other = MoELayer(4, 6, 3, 1).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.2\.0\.weight"):
        sharded.load_state_dict(other)


def test_noise_is_refused(alone, refuses):
    with refuses(ValueError, "moe_layer must have noisy=False, got noisy=True"):
        ExpertParallelMoE.from_layer(MoELayer(4, 6, 5, 2, noisy=True))


@pytest.mark.parametrize("name", ["d_model", "d_hidden", "num_experts"])
def test_sizes_below_one_are_refused(name, alone, refuses):
    sizes = {"d_model": 1, "d_hidden": 1, "num_experts": 1, "top_k": 1}
    ExpertParallelMoE(**sizes)
    with refuses(ValueError, f"{name} must be at least 1, got 0"):
        ExpertParallelMoE(**sizes | {name: 0})


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k, alone, refuses):
    with refuses(ValueError, f"top_k must be in 1..4, got {top_k}"):
        ExpertParallelMoE(2, 3, 4, top_k)
    ExpertParallelMoE(2, 3, 4, 4)


@pytest.mark.parametrize("shape", [(), (3,), (4, 3)])
def test_tokens_of_another_width_are_refused(shape, alone, refuses):
    with refuses(ValueError, f"x must be (..., 4), got {shape}"):
        ExpertParallelMoE(4, 6, 5, 2)(torch.randn(shape))


def refused(rank):
    try:
        ExpertParallelMoE(2, 3, 5, 1)
    except ValueError as error:
        return str(error)


def test_experts_that_do_not_divide_among_the_ranks_are_refused():
    message = "num_experts=5 must be a multiple of 2 ranks"
    assert on_ranks(2, refused) == [message] * 2


def test_without_a_process_group_it_says_what_to_call(refuses):
    with refuses(RuntimeError, "call torch.distributed.init_process_group first"):
        ExpertParallelMoE(2, 3, 4, 1)


def test_a_process_outside_the_group_is_refused(alone, refuses):
    outside = dist.GroupMember.NON_GROUP_MEMBER
    message = "group must include this process, got one that does not"
    with refuses(RuntimeError, message):
        ExpertParallelMoE(2, 3, 4, 1, outside)


def under_torchrun(folder):
    dist.init_process_group("gloo", timeout=SHORT)
    rank = dist.get_rank()
    layer, batches, arriving = torch.load(f"{folder}/case", weights_only=False)
    torch.save(share(rank, layer, batches, arriving), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_under_torchrun_it_gives_the_values_and_gradients_of_the_layer(
    tmp_path, randomize, agrees
):
    if "MUTANT_UNDER_TEST" in os.environ:
        pytest.skip("the forked processes above see every mutant, and sooner")
    case = setting((7, 4), 4, 2, randomize)
    torch.save(case, tmp_path / "case")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.moe.test_expert_parallel import under_torchrun\n"
        f"under_torchrun({str(tmp_path)!r})\n"
    )
    (tmp_path / "train.py").write_text(code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    results = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    compare(results, *case, agrees, atol=1e-12)
