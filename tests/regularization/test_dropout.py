"""Dropout against torch's: the same numbers from the same draws, and its statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from snippets.regularization.dropout import dropout

SHAPES = [(400, 5), (2, 3, 4), (7,), (), (0, 4), (1,)]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_torchs_when_both_draw_from_the_same_seed(
    shape, p, dtype, agrees_with_gradients
):
    def seeded(function):
        def run(x):
            torch.manual_seed(7)
            return function(x, p)

        return run

    # One product on either side: nothing to differ in
    agrees_with_gradients(
        seeded(dropout),
        seeded(F.dropout),
        torch.randn(shape, dtype=dtype),
        against="F.dropout",
        atol=0,
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_zeroed_and_the_rest_scaled(p):
    out = dropout(torch.ones(400, 500, dtype=torch.float64), p)
    assert abs((out == 0).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / 200_000)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_is_kept_and_the_variance_that_of_scaled_coins(p):
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    out = dropout(x.expand(200_000, 3), p)
    std = x.abs() * math.sqrt(p / (1 - p))
    assert ((out.mean(0) - x).abs() < 5 * std / math.sqrt(200_000)).all()
    torch.testing.assert_close(out.std(0), std, atol=0, rtol=0.02)


def test_elements_are_dropped_independently_of_each_other():
    kept = (dropout(torch.ones(100_000, 3), 0.3) != 0).double()
    covariance = torch.cov(kept.T)
    expected = 0.21 * torch.eye(3).double()
    torch.testing.assert_close(covariance, expected, atol=0.005, rtol=0)
    following = torch.corrcoef(torch.stack([kept[:-1, 0], kept[1:, 0]]))[0, 1]
    assert following.abs() < 0.02


def test_every_call_and_every_row_has_a_mask_of_its_own():
    x = torch.ones(4, 64)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 4


def test_the_gradient_is_the_mask_itself():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient == 0, out == 0)
    torch.testing.assert_close(gradient * x, out)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_outside_training_it_is_the_identity_and_draws_nothing(p):
    x = torch.randn(5)
    before = torch.get_rng_state()
    assert dropout(x, p, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(before, torch.get_rng_state())


def test_p_one_gives_zeros_and_a_zero_gradient():
    x = torch.randn(5, requires_grad=True)
    out = dropout(x, 1.0)
    assert torch.equal(out, torch.zeros(5))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(5))


def test_half_is_dropped_in_training_by_default():
    x = torch.randn(300)
    torch.manual_seed(3)
    ours = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x))


def test_a_generator_repeats_the_mask_and_leaves_the_default_one_alone():
    x = torch.randn(64)
    before = torch.get_rng_state()
    first = dropout(x, generator=torch.Generator().manual_seed(1))
    second = dropout(x, generator=torch.Generator().manual_seed(1))
    other = dropout(x, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_is_dropped_is_zero_and_what_is_kept_is_not_hidden(p, bad):
    x = torch.full((64,), bad, requires_grad=True)
    out = dropout(x, p, generator=torch.Generator().manual_seed(1))
    ones = dropout(torch.ones(64), p, generator=torch.Generator().manual_seed(1))
    dropped = ones == 0
    assert dropped.sum() == 64 if p == 1 else 16 < dropped.sum() < 48
    assert not out[dropped].any()
    kept = out[~dropped]
    torch.testing.assert_close(kept, torch.full_like(kept, bad), equal_nan=True)
    # The gradient is finite whatever x is.
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], ones)


def test_without_dropping_infinity_and_nan_stay():
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert dropout(x, 0.0) is x


def test_what_is_returned_is_contiguous_where_x_is():
    for p in (0.0, 0.5, 1.0):
        for training in (True, False):
            assert dropout(torch.randn(3, 4), p, training).is_contiguous()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_it_compiles_for_every_batch_size(p, compiles):
    compiles(dropout, *((torch.randn(B, 5), p) for B in (4, 3)))


def test_non_contiguous_inputs_work_and_are_not_modified():
    x = torch.randn(8, 5).T
    copy = x.clone()
    out = dropout(x, 0.5)
    assert torch.equal(x, copy)
    assert torch.equal(out[out != 0], 2 * x[out != 0])
    wide = dropout(torch.ones(1).expand(1000), 0.5)
    assert 0 < (wide == 0).sum() < 1000


def test_the_meta_device_works():
    assert dropout(torch.empty(3, 4, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit(dtype):
    x = 1e5 * torch.randn(64)
    with torch.autocast("cpu", dtype):
        torch.manual_seed(1)
        found = dropout(x, 0.3)
        torch.manual_seed(1)
        assert torch.equal(found, F.dropout(x, 0.3))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_probability_outside_zero_and_one_is_refused(p, training, refuses):
    with refuses(ValueError, f"p must lie in [0, 1], got {p}"):
        dropout(torch.ones(3), p, training)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_are_refused(dtype, refuses):
    with refuses(TypeError, f"x must be a float tensor, got {dtype}"):
        dropout(torch.ones(3, dtype=dtype))
