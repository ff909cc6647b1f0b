"""Gradient clipping against torch's own: norms, clipped gradients, edge cases."""

import math

import pytest
import torch
from torch import nn

from snippets.foundations.gradient_clipping import clip_grad_norm_, total_grad_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
TOLERANCE |= {torch.bfloat16: 1e-2, torch.float16: 1e-3}
HALF = [torch.bfloat16, torch.float16]
NORMS = [1.0, 2.0, 3.0, math.inf]


def parameters(dtype=torch.float32, size=1.0, shapes=((3, 4), (5,), (), (2, 1, 2))):
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = size * torch.randn_like(parameter)
    return made


def gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_that_of_all_gradients_in_one_vector(norm_type, dtype, agrees):
    given = parameters(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = min(TOLERANCE[dtype], 1e-6)  # the norm is not computed in half
    agrees(
        total_grad_norm(given, norm_type),
        gradients(given).to(wide).norm(norm_type),
        "the norm of the concatenated gradients",
        atol=tolerance,
        rtol=tolerance,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1.0, 100.0, math.inf])
def test_gradients_and_norm_are_torchs(max_norm, norm_type, dtype, agrees):
    ours = parameters(dtype)
    wide = torch.promote_types(dtype, torch.float32)  # torch's norm of half is in half
    theirs = [nn.Parameter(p.detach().to(wide)) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.to(wide, copy=True)
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert not norm.requires_grad
    against = "nn.utils.clip_grad_norm_"
    tolerance = TOLERANCE[dtype]
    agrees(norm, expected, against, atol=tolerance, rtol=tolerance)
    for a, b in zip(ours, theirs, strict=True):
        agrees(a.grad, b.grad.to(dtype), against, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_gradient_keeps_its_direction_and_gets_the_norm(seed):
    torch.manual_seed(seed)
    given = parameters(torch.float64, size=30)
    before = gradients(given)
    norm = clip_grad_norm_(given, 1.0)
    after = gradients(given)
    torch.testing.assert_close(norm, before.norm())
    assert 1 - 1e-6 < after.norm() <= 1
    assert torch.cosine_similarity(before, after, dim=0) > 1 - 1e-12


def test_a_short_gradient_is_not_changed_by_a_bit():
    given = parameters(size=0.01)
    before = gradients(given)
    clip_grad_norm_(given, 1.0)
    assert torch.equal(gradients(given), before)


def test_gradients_are_changed_in_place():
    given = parameters(size=30)
    places = [p.grad.data_ptr() for p in given]
    before = gradients(given)
    clip_grad_norm_(given, 1.0)
    assert [p.grad.data_ptr() for p in given] == places
    assert not torch.equal(gradients(given), before)


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda ps: (p for p in ps)])
def test_lists_and_generators_are_clipped_alike(kind):
    given = parameters(size=30)
    clip_grad_norm_(kind(given), 1.0)
    assert abs(gradients(given).norm() - 1) < 1e-5
    assert abs(total_grad_norm(kind(given)) - 1) < 1e-5


def test_one_tensor_is_a_parameter_and_not_its_rows():
    weight = nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.full((3, 2), 5.0)
    torch.testing.assert_close(total_grad_norm(weight), torch.tensor(math.sqrt(150)))
    clip_grad_norm_(weight, 1.0)
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(1.0))


def test_parameters_without_a_gradient_do_not_count():
    given = parameters(size=30)
    frozen = nn.Parameter(torch.ones(4))
    together = [frozen, *given, frozen]
    assert torch.equal(total_grad_norm(together), total_grad_norm(given))
    clip_grad_norm_(together, 1.0)
    assert frozen.grad is None and abs(gradients(given).norm() - 1) < 1e-5


@pytest.mark.parametrize("given", [[], [nn.Parameter(torch.ones(2))]], ids=len)
def test_without_any_gradient_the_norm_is_zero(given):
    for norm in (total_grad_norm(given), clip_grad_norm_(given, 1.0)):
        assert norm.shape == () and norm == 0


@pytest.mark.parametrize("norm_type", NORMS)
def test_an_empty_gradient_counts_as_nothing(norm_type):
    given = parameters(shapes=((0, 3), (4,)))
    expected = given[1].grad.norm(norm_type)
    torch.testing.assert_close(total_grad_norm(given, norm_type), expected)
    assert clip_grad_norm_(given[:1], 0.1, norm_type) == 0
    clip_grad_norm_(given, 0.1, norm_type)
    assert given[0].grad.shape == (0, 3)
    torch.testing.assert_close(given[1].grad.norm(norm_type), torch.tensor(0.1))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm_beyond_half_precision_is_clipped_to_the_limit(dtype):
    given = parameters(dtype, shapes=((3,), (6,)))
    for parameter in given:
        parameter.grad.fill_(60000.0)
    before = gradients(given).double()
    norm = clip_grad_norm_(given, 1.0)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), before.norm(), rtol=1e-6, atol=0)
    # What remains is the rounding of the gradients themselves.
    expected = (before / before.norm()).to(dtype)
    torch.testing.assert_close(gradients(given), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_no_bit(dtype):
    given, same = parameters(size=1e5), parameters()
    for a, b in zip(given, same, strict=True):
        b.grad = a.grad.clone()
    with torch.autocast("cpu", dtype):
        norm = clip_grad_norm_(given, 1.0)
    assert torch.equal(norm, clip_grad_norm_(same, 1.0))
    assert norm > 1e5 and torch.equal(gradients(given), gradients(same))


def test_it_compiles_for_any_size(compiles):
    def clipped(*grads):
        weights = [torch.zeros_like(grad) for grad in grads]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        return clip_grad_norm_(weights, 0.5), *(weight.grad for weight in weights)

    compiles(clipped, *((torch.randn(n, 2), torch.randn(3)) for n in (4, 3)))


def test_gradients_of_several_dtypes_make_one_norm():
    given = parameters(torch.float32) + parameters(torch.float64)
    given += parameters(torch.float16)
    expected = torch.cat([p.grad.flatten().double() for p in given]).norm()
    torch.testing.assert_close(total_grad_norm(given), expected, rtol=1e-6, atol=0)
    clip_grad_norm_(given, 0.1)
    assert [p.grad.dtype for p in given[3:5]] == [torch.float32, torch.float64]


def test_non_contiguous_gradients_work():
    weight = nn.Parameter(torch.zeros(3, 4).T)
    weight.grad = torch.randn(3, 4).T
    expected = weight.grad / weight.grad.norm()
    clip_grad_norm_(weight, 1.0)
    torch.testing.assert_close(weight.grad, expected)


def test_gradients_that_carry_a_graph_can_be_clipped():
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    (weight.grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert not clip_grad_norm_(weight, 1.0).requires_grad
    assert abs(weight.grad.norm() - 1) < 1e-6


def test_gradients_on_the_meta_device_keep_their_shape():
    weight = nn.Parameter(torch.zeros(3, device="meta"))
    weight.grad = torch.zeros(3, device="meta")
    assert clip_grad_norm_(weight, 1.0).shape == ()
    assert total_grad_norm(weight).device.type == "meta"


def test_norms_of_several_devices_meet_on_the_first():
    weights = [nn.Parameter(torch.zeros(3, device=d)) for d in ("meta", "cpu")]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert total_grad_norm(weights).device.type == "meta"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinite_or_nan_gradient_does_what_it_does_in_torch(bad):
    ours = parameters(shapes=((3,), (2,)))
    ours[0].grad[1] = bad
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.clone()
    norm = clip_grad_norm_(ours, 1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    same = {"equal_nan": True, "rtol": 0, "atol": 0}
    torch.testing.assert_close(norm, expected, **same)
    torch.testing.assert_close(gradients(ours), gradients(theirs), **same)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_refused_when_asked(bad, refuses):
    given = parameters()
    given[1].grad[0] = bad
    before = gradients(given)
    with refuses(RuntimeError, f"the norm of the gradients must be finite, got {bad}"):
        clip_grad_norm_(given, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(gradients(given), before, equal_nan=True, rtol=0, atol=0)
    finite = parameters()
    clip_grad_norm_(finite, 1.0, error_if_nonfinite=True)
    assert abs(gradients(finite).norm() - 1) < 1e-5


@pytest.mark.parametrize("max_norm", [-1e-9, -1.0, math.nan])
def test_a_negative_limit_is_refused(max_norm, refuses):
    with refuses(ValueError, f"max_norm must be at least 0, got {max_norm}"):
        clip_grad_norm_([], max_norm)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, math.nan])
def test_what_is_no_norm_is_refused(norm_type, refuses):
    with refuses(ValueError, f"norm_type must be positive, got {norm_type}"):
        total_grad_norm([], norm_type)
