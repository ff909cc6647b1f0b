"""The balance loss and the z loss against transformers, and what they are known for."""

import math

import pytest
import torch

from snippets.moe.load_balancing import (
    expert_load,
    load_balancing_loss,
    router_z_loss,
)

MIXTRAL = "transformers.models.mixtral.modeling_mixtral"
SWITCH = "transformers.models.switch_transformers.modeling_switch_transformers"

# Leading dimensions and E
SHAPES = [((7,), 4), ((2, 5), 8), ((1,), 3), ((3, 1, 4), 5), ((6,), 1), ((64,), 16)]


def one_by_one(logits, top_k, mask=None):
    """The loss in numbers of Python, token by token."""
    E = logits.shape[-1]
    rows = logits.reshape(-1, E).tolist()
    keep = [True] * len(rows) if mask is None else mask.flatten().tolist()
    rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
    f, P = [0.0] * E, [0.0] * E
    for row in rows:
        total = sum(map(math.exp, row))
        for i in sorted(range(E), key=row.__getitem__)[-top_k:]:
            f[i] += 1 / len(rows)
        for i in range(E):
            P[i] += math.exp(row[i]) / total / len(rows)
    return E * sum(a * b for a, b in zip(f, P, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("batch", "E"), SHAPES, ids=str)
def test_values_and_gradients_are_those_of_mixtral(
    batch, E, top_k, agrees_with_gradients, reference_library
):
    mixtral = reference_library(MIXTRAL)
    k = min(top_k, E)
    agrees_with_gradients(
        lambda x: load_balancing_loss(x, k),
        lambda x: mixtral.load_balancing_loss_func((x.reshape(-1, E),), E, k),
        torch.randn(*batch, E),
        against="transformers' Mixtral",
        atol=1e-6,
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_padding_counts_as_little_as_in_mixtral(
    top_k, agrees_with_gradients, reference_library
):
    mixtral = reference_library(MIXTRAL)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    agrees_with_gradients(
        lambda x: load_balancing_loss(x, top_k, mask),
        lambda x: mixtral.load_balancing_loss_func(
            (x.reshape(-1, 6),), 6, top_k, mask.long()
        ),
        torch.randn(2, 4, 6),
        against="transformers' Mixtral",
        atol=1e-6,
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_values_and_gradients_are_those_of_switch(
    top_k, agrees_with_gradients, reference_library
):
    switch = reference_library(SWITCH)

    def reference(x):
        chosen = x.topk(top_k).indices
        return switch.load_balancing_loss_func(x.softmax(-1)[None], chosen[None])

    agrees_with_gradients(
        lambda x: load_balancing_loss(x, top_k),
        reference,
        2 * torch.randn(20, 5),
        against="transformers' Switch",
        atol=1e-6,
    )


@pytest.mark.parametrize(("batch", "E"), [((7,), 4), ((2, 5), 8), ((1, 1), 1)], ids=str)
def test_the_z_loss_and_its_gradient_are_those_of_switch(
    batch, E, agrees_with_gradients, reference_library
):
    switch = reference_library(SWITCH)
    agrees_with_gradients(
        router_z_loss,
        lambda x: switch.router_z_loss_func(x.reshape(1, -1, E)),
        3 * torch.randn(*batch, E, dtype=torch.float64),
        against="transformers' Switch",
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_float64_is_the_formula_token_by_token(top_k, masked):
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.6 if masked else None
    found = load_balancing_loss(logits, top_k, mask)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(one_by_one(logits, top_k, mask), abs=1e-12)


def test_one_expert_a_token_is_the_default():
    logits = torch.randn(9, 4)
    assert torch.equal(load_balancing_loss(logits), load_balancing_loss(logits, 1))
    assert load_balancing_loss(logits) != load_balancing_loss(logits, 2)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_even_probabilities_give_k_whatever_is_chosen(top_k):
    logits = torch.full((8, 4), 0.7, dtype=torch.float64, requires_grad=True)
    loss = load_balancing_loss(logits, top_k)
    assert loss.item() == pytest.approx(top_k, abs=1e-12)
    # Ties: those that are chosen are pushed down.
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("all_on_one", [True, False])
def test_a_collapse_gives_the_number_of_experts(top_k, all_on_one):
    logits = torch.full((6, 4), -200.0, dtype=torch.float64)
    logits[:, : (1 if all_on_one else top_k)] = 100
    logits[:, 1:top_k] += torch.arange(1, top_k)  # no ties
    logits[:, 0] += top_k
    loss = load_balancing_loss(logits, top_k).item()
    assert loss == pytest.approx(4, abs=1e-12)


def test_of_equal_logits_the_lower_index_is_chosen():
    logits = torch.zeros(3, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(load_balancing_loss(logits, 2), logits)
    assert (gradient[:, :2] > 0).all() and (gradient[:, 2:] < 0).all()


def test_shares_that_are_not_the_probabilities_go_below_one():
    probabilities = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]])
    loss = load_balancing_loss(probabilities.double().log())
    # f = (2/3, 1/3) and P = (1.03, 1.97) / 3
    expected = 2 * (2 * 1.03 + 1.97) / 9
    assert loss.item() == pytest.approx(expected, abs=1e-6) and loss < 0.9


def test_the_gradient_flows_through_the_probabilities_alone():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(load_balancing_loss(logits, 2), logits)
    f = torch.zeros(4, dtype=torch.float64)
    for row in logits.detach().topk(2).indices:
        f[row] += 1 / 6
    p = logits.detach().softmax(-1)
    expected = 4 / 6 * p * (f - (f * p).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 0, 1, 2, 3], [2, 1, 3, 0, 3, 0, 1, 2]])
def test_even_shares_have_no_gradient_whoever_gets_what(order):
    logits = torch.rand(8, 4, dtype=torch.float64)
    logits[torch.arange(8), order] += 2
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(load_balancing_loss(logits), logits)
    assert gradient.abs().max() < 1e-12


def test_a_step_against_the_gradient_evens_the_load():
    logits = torch.randn(50, 5, dtype=torch.float64)
    logits[:, 0] += 3
    before = expert_load(logits.argmax(-1), 5)
    for _ in range(200):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(load_balancing_loss(logits), logits)
        logits = logits.detach() - 10 * gradient
    after = expert_load(logits.argmax(-1), 5)
    assert before.max() > 0.7 and after.max() < 0.35 and after.min() > 0.05


def test_padding_counts_nowhere_whatever_it_holds():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    padded = logits.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    for loss in (lambda x, m: load_balancing_loss(x, 2, m), router_z_loss):
        without = loss(logits[mask], None)
        within = loss(padded, mask)
        torch.testing.assert_close(within, without, atol=1e-12, rtol=0)
        (gradient,) = torch.autograd.grad(within, padded)
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (2, 0, 4)])
def test_no_token_at_all_gives_zero_and_a_zero_gradient(shape):
    logits = torch.full(shape, torch.inf, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    losses = [load_balancing_loss(logits, 2, mask), router_z_loss(logits, mask)]
    if not logits.numel():
        losses += [load_balancing_loss(logits, 2), router_z_loss(logits)]
    for loss in losses:
        assert loss.item() == 0 and loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros(shape))


def test_one_token_and_one_expert():
    assert load_balancing_loss(torch.tensor([3.0])).item() == 1
    assert load_balancing_loss(torch.tensor([[3.0]])).item() == 1
    assert router_z_loss(torch.tensor([3.0])).item() == pytest.approx(9, abs=1e-5)
    mask = torch.tensor(True)
    assert load_balancing_loss(torch.tensor([3.0]), mask=mask).item() == 1


# Only the logits are rounded (to 2**-8 and 2**-11 of them) and the float32 in between.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    logits = (3 * torch.randn(1000, 8)).to(dtype)
    mask = torch.rand(1000) < 0.8
    for loss in (lambda x: load_balancing_loss(x, 2, mask), router_z_loss):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = loss(logits)
        assert found.dtype == torch.float32
        exact = loss(logits.double())
        torch.testing.assert_close(found.double(), exact, atol=0, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_no_bit(dtype):
    logits = (3 * torch.randn(100, 8)).to(dtype).requires_grad_()
    for loss in (lambda x: load_balancing_loss(x, 2), router_z_loss):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(logits)
        assert inside.dtype == dtype and torch.equal(inside, loss(logits))
        found, expected = (
            torch.autograd.grad(x, logits)[0] for x in (inside, loss(logits))
        )
        assert torch.equal(found, expected)


def test_large_logits_are_no_overflow():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    assert load_balancing_loss(logits).item() == 1
    assert router_z_loss(logits).item() == 500_000
    assert router_z_loss(logits.half()).item() == 500_000


def test_non_contiguous_logits_work(agrees_with_gradients):
    wide = torch.randn(5, 6, 4, dtype=torch.float64)
    mask = (torch.rand(6, 4) < 0.6).T
    agrees_with_gradients(
        lambda x: load_balancing_loss(x.permute(2, 1, 0), 2, mask),
        lambda x: load_balancing_loss(
            x.permute(2, 1, 0).contiguous(), 2, mask.contiguous()
        ),
        wide,
        against="itself, contiguous",
        atol=1e-12,
    )


def test_inputs_are_not_modified():
    logits, mask = torch.randn(5, 3), torch.tensor([True, False, True, True, False])
    kept = logits.clone(), mask.clone()
    load_balancing_loss(logits, 2, mask)
    router_z_loss(logits, mask)
    assert torch.equal(logits, kept[0]) and torch.equal(mask, kept[1])


def test_the_losses_compile_for_any_size(compiles):
    def both(logits, mask):
        return load_balancing_loss(logits, 2, mask), router_z_loss(logits)

    calls = ((torch.randn(n, 4), torch.rand(n) < 0.5) for n in (6, 5))
    compiles(both, *calls)


def test_meta_device_works():
    logits = torch.randn(2, 3, 4, device="meta")
    assert load_balancing_loss(logits, 2).device.type == "meta"
    assert router_z_loss(logits).device.type == "meta"


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_the_load_is_the_share_of_the_choices(dtype):
    indices = torch.tensor([[0, 2], [2, 3], [2, 0], [3, 2]], dtype=dtype)
    load = expert_load(indices, 5)
    assert load.dtype == torch.float32
    assert load.tolist() == [0.25, 0, 0.5, 0.25, 0]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 2), (2, 3, 2)], ids=str)
def test_the_load_sums_to_one(shape):
    load = expert_load(torch.randint(6, shape), 6)
    assert load.shape == (6,) and load.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_load_of_nothing_is_zero_and_does_not_depend_on_the_default_dtype():
    assert expert_load(torch.empty(0, 2, dtype=torch.long), 3).tolist() == [0, 0, 0]
    assert expert_load(torch.tensor([0]), 1).tolist() == [1]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert expert_load(torch.tensor([0]), 1).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("num_experts", [0, -1])
def test_less_than_one_expert_is_refused(num_experts, refuses):
    with refuses(ValueError, f"num_experts must be at least 1, got {num_experts}"):
        expert_load(torch.tensor([0]), num_experts)


@pytest.mark.parametrize("index", [-1, 3, 300])
def test_an_index_out_of_range_is_refused(index, refuses):
    with refuses(ValueError, f"indices must be in 0..2, got {index}"):
        expert_load(torch.tensor([[0, 2], [index, 1]]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_indices_that_are_no_integers_are_refused(dtype, refuses):
    with refuses(TypeError, f"indices must be integers, got {dtype}"):
        expert_load(torch.ones(3).to(dtype), 2)


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_more_choices_than_experts_are_refused(top_k, refuses):
    with refuses(ValueError, f"top_k must be in 1..4, got {top_k}"):
        load_balancing_loss(torch.randn(3, 4), top_k)
    load_balancing_loss(torch.randn(3, 4), 4)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_logits_of_no_experts_are_refused(shape, refuses):
    for loss in (load_balancing_loss, router_z_loss):
        with refuses(ValueError, f"router_logits must be (..., E), got {shape}"):
            loss(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_logits_that_are_no_floats_are_refused(dtype, refuses):
    for loss in (load_balancing_loss, router_z_loss):
        with refuses(TypeError, f"router_logits must have a float dtype, got {dtype}"):
            loss(torch.ones(3, 2).to(dtype))


@pytest.mark.parametrize("shape", [(), (2,), (3,), (6,), (2, 3, 1), (2, 1), (3, 2)])
def test_a_mask_of_another_shape_is_refused(shape, refuses):
    mask = torch.ones(shape, dtype=torch.bool)
    for loss in (load_balancing_loss, router_z_loss):
        with refuses(ValueError, f"mask must be (2, 3), got {shape}"):
            loss(torch.randn(2, 3, 4), mask=mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_that_is_not_bool_is_refused(dtype, refuses):
    for loss in (load_balancing_loss, router_z_loss):
        with refuses(TypeError, f"mask must be bool, got {dtype}"):
            loss(torch.randn(3, 4), mask=torch.ones(3).to(dtype))
