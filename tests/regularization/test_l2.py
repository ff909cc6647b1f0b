"""The L2 penalty against ridge regression, AdamW against torch's two optimizers."""

import copy

import pytest
import torch
from torch import nn

from snippets.regularization.l2 import AdamW, l2_penalty

# Ours, and the class of torch that does the same
KINDS = [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
kinds = pytest.mark.parametrize(
    ("decoupled", "reference"), KINDS, ids=["decoupled", "in the gradient"]
)


def parameters(dtype=torch.float64):
    return [
        nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(3, 4), (5,), ()]
    ]


def train(optimizer, weights, gradients):
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


def gradients_like(weights, steps):
    # Of very different sizes: Adam divides by them.
    return [
        [
            torch.randn_like(w) * 10 ** torch.empty(()).uniform_(-3, 2).item()
            for w in weights
        ]
        for _ in range(steps)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"lr": 0.05, "weight_decay": 0.5},
        {"betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.1, "lr": 0.1},
        {"betas": (0.0, 0.0), "lr": 0.01},
    ],
    ids=str,
)
@kinds
def test_sixty_steps_are_those_of_torch_and_so_is_the_state(
    decoupled, reference, options, agrees
):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours, **options, decoupled=decoupled)
    torchs = reference(theirs, **{"weight_decay": 1e-2, **options})
    gradients = gradients_like(ours, 60)
    train(optimizer, ours, gradients)
    train(torchs, theirs, gradients)
    against = f"torch.optim.{reference.__name__}"
    for mine, its in zip(ours, theirs, strict=True):
        agrees(mine, its, against, atol=1e-12, rtol=1e-12)
        assert optimizer.state[mine].keys() == torchs.state[its].keys()
        for name, value in torchs.state[its].items():
            agrees(optimizer.state[mine][name], value, against, atol=1e-12, rtol=1e-12)


def test_the_defaults_are_those_of_torchs_adamw():
    ours = AdamW(parameters()).defaults
    theirs = torch.optim.AdamW(parameters()).defaults
    assert ours == {name: theirs[name] for name in ours}


# Each of five steps may round a weight the other way: by 2**-23 or by 2**-7 of it.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)]
)
@kinds
def test_lower_precisions_are_as_exact_as_they_can_be(
    decoupled, reference, dtype, tolerance, agrees
):
    ours = parameters(dtype)
    theirs = copy.deepcopy(ours)
    gradients = gradients_like(ours, 5)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    train(AdamW(ours, **options, decoupled=decoupled), ours, gradients)
    train(reference(theirs, **options, foreach=False), theirs, gradients)
    against = f"torch.optim.{reference.__name__}"
    for mine, its in zip(ours, theirs, strict=True):
        agrees(mine, its, against, atol=tolerance, rtol=tolerance)


@kinds
def test_training_goes_on_where_torchs_optimizer_left_off_and_back(
    decoupled, reference, agrees
):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    gradients = gradients_like(ours, 10)
    torchs = reference(theirs, lr=0.1, weight_decay=0.2)
    train(torchs, theirs, gradients[:5])

    twin = copy.deepcopy(theirs)
    optimizer = AdamW(twin)
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    train(optimizer, twin, gradients[5:])
    train(torchs, theirs, gradients[5:])
    against = f"torch.optim.{reference.__name__}"
    for mine, its in zip(twin, theirs, strict=True):
        agrees(mine, its, against, atol=1e-12, rtol=1e-12)

    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(torchs, theirs, gradients)
    train(optimizer, twin, gradients)
    for mine, its in zip(twin, theirs, strict=True):
        agrees(mine, its, against, atol=1e-12, rtol=1e-12)


def test_groups_have_options_of_their_own_and_a_schedule_is_followed(agrees):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    runs = []
    for cls, (weight, bias, scale) in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [
            {"params": [weight], "weight_decay": 0.5},
            {"params": [bias, scale], "weight_decay": 0.0, "lr": 0.3},
        ]
        optimizer = cls(groups, lr=0.1)
        runs.append((optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)))
    for gradients in gradients_like(ours, 10):
        for (optimizer, schedule), weights in zip(runs, (ours, theirs), strict=True):
            train(optimizer, weights, [gradients])
            schedule.step()
    for mine, its in zip(ours, theirs, strict=True):
        agrees(mine, its, "torch.optim.AdamW", atol=1e-12, rtol=1e-12)


def test_the_minimum_with_the_penalty_is_ridge_regression(agrees):
    X, y = torch.randn(30, 5).double(), torch.randn(30).double()

    def loss(w):
        return (X @ w - y).square().sum() / 2 + l2_penalty(w, 3.0)

    start = torch.randn(5, dtype=torch.float64)
    # One step of Newton's method finds the minimum of a parabola.
    slope = torch.autograd.functional.jacobian(loss, start)
    curvature = torch.autograd.functional.hessian(loss, start)
    minimum = start - torch.linalg.solve(curvature, slope)
    exact = torch.linalg.solve(X.T @ X + 3.0 * torch.eye(5).double(), X.T @ y)
    agrees(minimum, exact, "ridge regression in closed form", atol=1e-12)


def test_the_penalty_of_several_tensors_and_its_gradient(agrees):
    weights = parameters()
    penalty = l2_penalty((w for w in weights), 0.3)
    expected = sum(0.15 * x**2 for w in weights for x in w.flatten().tolist())
    assert penalty.shape == () and penalty.item() == pytest.approx(expected, abs=1e-12)
    for weight, gradient in zip(
        weights, torch.autograd.grad(penalty, weights), strict=True
    ):
        agrees(gradient, 0.3 * weight, "weight_decay * w", atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_under_sgd_the_penalty_is_the_optimizers_weight_decay(momentum, agrees):
    def run(with_penalty):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        decay = 0.0 if with_penalty else 0.2
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=momentum, weight_decay=decay
        )
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4).double()).square().sum()
            if with_penalty:
                loss = loss + l2_penalty(model.parameters(), 0.2)
            loss.backward()
            optimizer.step()
        return model.weight

    agrees(run(True), run(False), "torch.optim.SGD(weight_decay)", atol=1e-12)


def test_the_penalty_in_the_loss_is_what_not_decoupled_means(agrees):
    inside, outside = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    outside.load_state_dict(inside.state_dict())
    x = torch.randn(8, 4).double()
    for model, penalty, optimizer in [
        (inside, 0.2, AdamW(inside.parameters(), weight_decay=0.0)),
        (outside, 0, AdamW(outside.parameters(), weight_decay=0.2, decoupled=False)),
    ]:
        for _ in range(20):
            optimizer.zero_grad()
            (
                model(x).square().sum() + l2_penalty(model.parameters(), penalty)
            ).backward()
            optimizer.step()
    agrees(inside.weight, outside.weight, "AdamW(decoupled=False)", atol=1e-12)


def test_without_gradients_of_a_loss_the_weights_shrink_geometrically():
    w = nn.Parameter(torch.tensor([2.0, -4.0], dtype=torch.float64))
    optimizer = AdamW([w], lr=0.1, weight_decay=0.5)
    for _ in range(10):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    expected = torch.tensor([2.0, -4.0], dtype=torch.float64) * 0.95**10
    torch.testing.assert_close(w.detach(), expected, atol=1e-12, rtol=0)


def test_only_the_decoupled_decay_ignores_the_scale_of_the_loss():
    def run(scale, decoupled):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(6, dtype=torch.float64))
        optimizer = AdamW([w], lr=0.05, eps=0.0, weight_decay=0.5, decoupled=decoupled)
        train(optimizer, [w], [[scale * torch.randn(6).double()] for _ in range(60)])
        return w.detach()

    torch.testing.assert_close(run(1, True), run(1000, True), atol=1e-10, rtol=0)
    assert (run(1, False) - run(1000, False)).abs().max() > 0.05


def test_a_closure_is_called_once_and_its_loss_returned():
    w = nn.Parameter(torch.ones(3))
    optimizer, calls = AdamW([w]), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and len(calls) == 1
    assert (w < 1).all()
    assert optimizer.step() is None


def test_a_closure_has_gradients_even_where_none_are_kept():
    w = nn.Parameter(torch.ones(3))
    optimizer = AdamW([w])

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
        assert not torch.is_grad_enabled()
    assert (w < 1).all()


def test_a_parameter_without_gradient_is_left_alone():
    frozen, w = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([frozen, w], weight_decay=0.5)
    w.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2)) and (w < 1).all()
    assert list(optimizer.state) == [w]


@pytest.mark.parametrize("decoupled", [True, False])
def test_gradients_are_not_modified(decoupled):
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([1.0, 2.0])
    AdamW([w], weight_decay=0.5, decoupled=decoupled).step()
    assert w.grad.tolist() == [1.0, 2.0]


def test_non_contiguous_and_empty_parameters_work(agrees):
    ours = nn.Parameter(torch.randn(4, 3, dtype=torch.float64).T)
    theirs = nn.Parameter(ours.detach().contiguous())
    assert not ours.is_contiguous()
    gradients = [[g] for g in torch.randn(5, 3, 4, dtype=torch.float64)]
    train(AdamW([ours]), [ours], gradients)
    train(torch.optim.AdamW([theirs]), [theirs], gradients)
    agrees(ours, theirs, "torch.optim.AdamW", atol=1e-12)
    empty = nn.Parameter(torch.empty(0, 3))
    train(AdamW([empty]), [empty], [[torch.empty(0, 3)]])
    assert l2_penalty(empty, 1.0).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit(dtype):
    ours = [nn.Parameter(1000 * torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    same = copy.deepcopy(ours)
    gradients = gradients_like(ours, 3)
    with torch.autocast("cpu", dtype):
        penalty = l2_penalty(ours, 1.0)
        (gradient,) = torch.autograd.grad(penalty, ours[:1])
        train(AdamW(ours), ours, gradients)
    assert torch.equal(penalty, l2_penalty(same, 1.0)) and penalty > 1e6
    assert torch.equal(gradient, same[0])
    train(AdamW(same), same, gradients)
    assert all(map(torch.equal, ours, same))


@kinds
def test_float16_weights_end_where_torch_ends(decoupled, reference, agrees):
    ours = [nn.Parameter(torch.ones(3, dtype=torch.float16))]
    theirs = copy.deepcopy(ours)
    # eps of 1e-8 is 0 in float16: 0/0 where the gradient is 0
    gradients = [[torch.tensor([0.0, 1.0, -3.0], dtype=torch.float16)]] * 2
    train(AdamW(ours, weight_decay=0.0, decoupled=decoupled), ours, gradients)
    train(reference(theirs, weight_decay=0.0), theirs, gradients)
    assert (
        ours[0].isnan().tolist() == theirs[0].isnan().tolist() == [True, False, False]
    )
    agrees(ours[0][1:], theirs[0][1:], f"torch.optim.{reference.__name__}", atol=1e-3)


def test_steps_are_counted_in_float32_whatever_the_default_is():
    w = nn.Parameter(torch.ones(2))
    optimizer = AdamW([w])
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        train(optimizer, [w], [[torch.ones_like(w)]] * 300)
    finally:
        torch.set_default_dtype(default)
    assert optimizer.state[w]["step"].dtype == torch.float32
    assert optimizer.state[w]["step"] == 300


def test_the_penalty_compiles_for_any_size(compiles):
    calls = (([torch.randn(size, 2), torch.randn(3)], 0.5) for size in (4, 3))
    compiles(l2_penalty, *calls)


@pytest.mark.parametrize("decoupled", [True, False])
def test_states_of_contiguous_weights_are_contiguous(decoupled):
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = AdamW([w], decoupled=decoupled)
    train(optimizer, [w], [[torch.randn(4, 3).T]])
    assert w.is_contiguous()
    assert all(value.is_contiguous() for value in optimizer.state[w].values())


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
@kinds
def test_what_only_torchs_optimizer_can_do_is_refused(
    decoupled, reference, name, refuses
):
    w = nn.Parameter(torch.ones(2))
    torchs = reference([w], lr=0.3, **{name: True})
    optimizer = AdamW([w], decoupled=decoupled)
    before = copy.deepcopy(optimizer.state_dict())
    with refuses(ValueError, f"{name} must be False, got True"):
        optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.state_dict() == before
    with refuses(ValueError, f"{name} must be False, got True"):
        AdamW([{"params": [w], name: True}])
    v = nn.Parameter(torch.ones(2))
    with refuses(ValueError, f"{name} must be False, got True"):
        optimizer.add_param_group({"params": [v], name: True})
    optimizer.add_param_group({"params": [v], name: False})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
    ],
    ids=str,
)
def test_options_of_a_group_and_of_a_loaded_state_are_checked_too(
    bad, message, refuses
):
    w = nn.Parameter(torch.ones(2))
    with refuses(ValueError, message):
        AdamW([{"params": [w], **bad}])
    optimizer = AdamW([w])
    state = optimizer.state_dict()
    state["param_groups"][0].update(bad)
    with refuses(ValueError, message):
        optimizer.load_state_dict(state)


def test_the_state_of_another_kind_of_optimizer_is_not_loaded():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="eps"):
        AdamW([w]).load_state_dict(torch.optim.SGD([w]).state_dict())


def test_a_state_for_other_parameters_is_not_loaded():
    state = AdamW(parameters()).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        AdamW(parameters()[:2]).load_state_dict(state)


def test_meta_device_works():
    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    AdamW([w]).step()
    assert l2_penalty([w], 1.0).device.type == "meta"


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_penalty_does_not_overflow_in_half_precision(dtype, wide):
    penalty = l2_penalty(torch.full((4,), 1000.0, dtype=dtype), 1.0)
    assert penalty.dtype == wide and penalty.item() == 2e6


@pytest.mark.parametrize("value", [-0.1, float("nan")])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_negative_coefficients_are_refused(name, value, refuses):
    with refuses(ValueError, f"{name} must be at least 0, got {value}"):
        AdamW(parameters(), **{name: value})
    AdamW(parameters(), **{name: 0})


@pytest.mark.parametrize(
    "betas",
    [
        *[(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (0.9, float("nan"))],
        *[(), (0.9,), (0.9, 0.9, 0.9)],
    ],
    ids=str,
)
def test_betas_other_than_two_in_zero_and_one_are_refused(betas, refuses):
    with refuses(ValueError, f"betas must be two numbers in [0, 1), got {betas}"):
        AdamW(parameters(), betas=betas)


def test_a_penalty_that_is_negative_or_of_nothing_is_refused(refuses):
    with refuses(ValueError, "weight_decay must be at least 0, got -1"):
        l2_penalty(torch.ones(2), -1)
    with refuses(ValueError, "parameters must hold a tensor at least, got none"):
        l2_penalty(iter([]), 1)
    assert l2_penalty(torch.ones(2), 0).item() == 0


def test_sparse_and_complex_gradients_are_refused(refuses):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    message = "grad must be dense and real, got "
    with refuses(TypeError, message + "torch.float32, torch.sparse_coo"):
        AdamW(table.parameters()).step()
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with refuses(TypeError, message + "torch.complex64, torch.strided"):
        AdamW([w]).step()
