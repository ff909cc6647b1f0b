"""Linear against nn.Linear and He's bound against torch's: values, gradients, draws."""

import math

import pytest
import torch
from torch import nn

from snippets.foundations.linear import Linear, kaiming_uniform_bound

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3,), (2, 4, 3), (0, 3), (1, 3)], ids=str)
def test_values_and_gradients_are_those_of_torchs_layer(
    shape, bias, dtype, agrees_with_gradients, randomize
):
    reference = randomize(nn.Linear(3, 7, bias=bias).to(dtype))
    ours = Linear(3, 7, bias=bias).to(dtype)
    ours.load_state_dict(reference.state_dict())
    agrees_with_gradients(
        ours,
        reference,
        torch.randn(shape, dtype=dtype),
        against="nn.Linear",
        atol=TOLERANCE[dtype],
        modules=(ours, reference),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (400, 3)], ids=str)
def test_the_same_seed_draws_the_weights_of_torchs_layer(sizes, bias):
    torch.manual_seed(3)
    ours, after = Linear(*sizes, bias=bias), torch.rand(())
    torch.manual_seed(3)
    reference, after_reference = nn.Linear(*sizes, bias=bias), torch.rand(())
    found, expected = ours.state_dict(), reference.state_dict()
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)
    assert torch.equal(after, after_reference)  # nothing more was drawn


@pytest.mark.parametrize("fan_in", [1, 7, 400])
def test_weight_and_bias_are_uniform_within_one_over_the_root_of_the_inputs(fan_in):
    layer = Linear(fan_in, 4000)
    bound = 1 / math.sqrt(fan_in)
    for parameter in (layer.weight, layer.bias):
        assert 0.99 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std().item() / (bound / math.sqrt(3)) - 1) < 0.04
        assert abs(parameter.mean().item()) < 0.05 * bound


def test_reset_parameters_draws_anew_and_keeps_the_parameters():
    layer = Linear(4, 3)
    weight, bias = layer.weight, layer.bias
    before = weight.clone(), bias.clone()
    layer.reset_parameters()
    assert layer.weight is weight and layer.bias is bias
    assert not (weight == before[0]).any() and not (bias == before[1]).any()


@pytest.mark.parametrize("a", [0.0, 0.2, 1.0, math.sqrt(5)])
@pytest.mark.parametrize("fan_in", [1, 3, 256])
def test_the_bound_is_that_of_torchs_kaiming_uniform(fan_in, a):
    drawn = nn.init.kaiming_uniform_(torch.empty(200_000 // fan_in, fan_in), a=a)
    bound = kaiming_uniform_bound(fan_in, a)
    assert 0.999 * bound < drawn.abs().max() <= bound * (1 + 1e-6)


def test_the_slope_of_the_bound_is_zero_by_default():
    assert kaiming_uniform_bound(6) == kaiming_uniform_bound(6, 0.0) == 1.0


def test_hes_variance_keeps_the_mean_square_through_relu_layers():
    width, x = 512, torch.randn(64, 512)
    bound = kaiming_uniform_bound(width)
    for _ in range(10):
        x = (x @ torch.empty(width, width).uniform_(-bound, bound)).relu()
    # Half of the units are off, so that the mean square is that of one side.
    assert 0.3 < x.square().mean() < 3


def test_a_layer_has_a_bias_unless_told_otherwise():
    assert Linear(2, 3).bias.shape == (3,)
    assert Linear(2, 3, bias=False).bias is None


def test_non_contiguous_inputs_and_the_meta_device_work():
    layer = Linear(4, 3)
    for x in (torch.randn(4, 6).T, torch.randn(4, 6, 2).permute(2, 1, 0)):
        assert not x.is_contiguous() and layer(x).is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer.to("meta")(torch.empty(2, 4, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_rounds_where_torchs_layer_rounds(bias, dtype, randomize, agrees):
    reference = randomize(nn.Linear(3, 7, bias=bias))
    ours = Linear(3, 7, bias=bias)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype):
        assert ours(x).dtype == dtype
        agrees(ours(x), reference(x), "nn.Linear", atol=0)


def test_it_compiles_for_every_batch_size(compiles):
    compiles(Linear(3, 7), *((torch.randn(B, 3),) for B in (4, 3)))


def test_weights_that_do_not_all_fit_are_not_loaded():
    for other in (nn.Linear(3, 7, bias=False), nn.Bilinear(3, 3, 7)):
        with pytest.raises(RuntimeError, match="loading state_dict"):
            Linear(3, 7).load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        Linear(3, 7, bias=False).load_state_dict(nn.Linear(3, 7).state_dict())


@pytest.mark.parametrize("shape", [(5, 4), (3, 2), (), (0,)], ids=str)
def test_another_last_dimension_is_refused(shape, refuses):
    with refuses(ValueError, f"x must be (..., 3), got {shape}"):
        Linear(3, 7)(torch.ones(shape))


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (-1, 1)], ids=str)
def test_sizes_below_one_are_refused(sizes, refuses):
    message = "in_features and out_features must be at least 1, got {} and {}"
    with refuses(ValueError, message.format(*sizes)):
        Linear(*sizes)


@pytest.mark.parametrize("fan_in", [0, -3, math.nan])
def test_a_fan_in_below_one_is_refused(fan_in, refuses):
    with refuses(ValueError, f"fan_in must be at least 1, got {fan_in}"):
        kaiming_uniform_bound(fan_in)
