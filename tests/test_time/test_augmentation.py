"""Test-time augmentation against the mean written out, and what it promises."""

import pytest
import torch
from torch import nn

from snippets.test_time.augmentation import test_time_augmentation as averaged


def identity(x):
    return x


def flip(x):
    return x.flip(-1)


def shift(x):
    return x.roll(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transforms", [[identity], [flip, shift], [identity] * 5])
@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (0, 6)])
def test_it_is_the_mean_of_the_probabilities(shape, transforms, dtype, agrees):
    model, x = nn.Linear(6, 3).to(dtype), torch.randn(shape, dtype=dtype)
    written = sum(nn.functional.softmax(model(t(x)), -1) for t in transforms)
    expected = (written / len(transforms)).detach()
    found = averaged(model, x, transforms)
    agrees(found, expected, "the mean of F.softmax", atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[:, 0]))


def test_probabilities_are_averaged_and_not_logits():
    logits = iter([torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 2.0]])])
    found = averaged(lambda x: next(logits), torch.zeros(1), [identity] * 2)
    torch.testing.assert_close(
        found, torch.tensor([[0.5596, 0.4404]]), atol=1e-3, rtol=0
    )


def test_the_order_does_not_matter_and_any_iterable_will_do(agrees):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    forward = averaged(model, x, iter([identity, flip, shift]))
    backward = averaged(model, x, (shift, flip, identity))
    agrees(forward, backward, "another order", atol=1e-6)


def test_a_model_that_is_invariant_gains_nothing(agrees):
    def model(x):
        return torch.stack([x.sum(-1), x.amax(-1)], -1)

    x = torch.randn(4, 6)
    agrees(
        averaged(model, x, [identity, flip, shift]),
        model(x).softmax(-1),
        "itself",
        1e-6,
    )


def test_each_transform_costs_one_pass_without_gradient():
    model, x = nn.Linear(6, 3), torch.randn(4, 6, requires_grad=True)
    calls, before = [], [p.clone() for p in model.parameters()]
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = averaged(model, x, [identity, flip, shift])
    assert calls == [False] * 3
    assert not found.requires_grad and torch.is_grad_enabled()
    assert all(map(torch.equal, before, model.parameters()))


def test_the_mode_of_the_model_stays():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    for training in (True, False):
        model.train(training)
        averaged(model, torch.randn(2, 6), [identity])
        assert model.training is training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probabilities_are_in_float32_under_autocast_and_for_half_precision(dtype):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    exact = averaged(model.double(), x.double(), [identity, flip])
    model = model.float()
    with torch.autocast("cpu", dtype):
        found = averaged(model, x, [identity, flip])
    half = averaged(model.to(dtype), x.to(dtype), [identity, flip])
    for probs in (found, half):
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.double(), exact, atol=0.02, rtol=0)
        # rounded to half precision the sums would be off by up to 4e-3
        torch.testing.assert_close(probs.sum(-1), torch.ones(4), atol=1e-6, rtol=0)


def test_inputs_are_not_modified_and_need_not_be_contiguous(agrees):
    model, x = nn.Linear(6, 3), torch.randn(6, 4).T
    before = x.clone()
    found = averaged(model, x, [identity, flip])
    assert torch.equal(x, before) and found.is_contiguous()
    agrees(found, averaged(model, x.contiguous(), [identity, flip]), "contiguous", 1e-6)


def test_pytest_does_not_take_it_for_a_test():
    assert averaged.__test__ is False


def test_no_transforms_are_refused(refuses):
    with refuses(ValueError, "transforms must not be empty"):
        averaged(nn.Linear(6, 3), torch.randn(2, 6), [])


def test_versions_of_another_size_are_refused(refuses):
    message = "logits of all transforms must be alike, got (1, 3) after (4, 3)"
    with refuses(ValueError, message):
        averaged(nn.Linear(6, 3), torch.randn(4, 6), [identity, lambda x: x[:1]])
