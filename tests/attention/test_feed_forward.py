"""The position-wise feed-forward network against torch's encoder layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.attention.feed_forward import PositionwiseFeedForward

# 32 products of order 1: float64 and float32 keep 53 and 24 bits. bfloat16 keeps 8, and
# both sides round the same intermediate results to it.
PRECISIONS = [
    (torch.float64, 1e-10, 0),
    (torch.float32, 1e-5, 0),
    (torch.bfloat16, 3e-2, 3e-2),
]


@pytest.mark.parametrize(("dtype", "atol", "rtol"), PRECISIONS)
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (5, 8), (8,), (0, 3, 8)])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_values_and_gradients_are_those_of_torch(
    activation, shape, dtype, atol, rtol, randomize, agrees_with_gradients
):
    ours = randomize(PositionwiseFeedForward(8, 16, activation=activation)).to(dtype)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation).to(dtype)
    reference = nn.ModuleDict({"linear1": layer.linear1, "linear2": layer.linear2})
    reference.load_state_dict(ours.state_dict())
    layer.eval()
    agrees_with_gradients(
        ours,
        layer._ff_block,  # private, but all else of the layer adds attention to it
        torch.randn(shape, dtype=dtype),
        against="nn.TransformerEncoderLayer",
        atol=atol,
        rtol=rtol,
        modules=(ours, reference),
    )


def test_a_seed_gives_the_weights_that_torch_would_give():
    torch.manual_seed(3)
    ours = PositionwiseFeedForward(8, 16).state_dict()
    torch.manual_seed(3)
    theirs = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).state_dict()
    assert list(ours) == [
        "linear1.weight",
        "linear1.bias",
        "linear2.weight",
        "linear2.bias",
    ]
    assert all(map(torch.equal, ours.values(), theirs.values()))


def test_hidden_layer_is_four_times_as_wide_by_default():
    ffn = PositionwiseFeedForward(6)
    assert ffn.linear1.weight.shape == (24, 6)
    assert ffn.linear2.weight.shape == (6, 24)


def test_each_token_is_transformed_by_itself(randomize):
    ffn = randomize(PositionwiseFeedForward(8, 16).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    one_by_one = torch.stack([ffn(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(ffn(x), one_by_one, atol=1e-12, rtol=0)


def test_a_token_changes_its_own_output_only(randomize):
    ffn = randomize(PositionwiseFeedForward(8, 16).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 3] = torch.randn(2, 8)
    changed = (ffn(x) != ffn(y)).any(-1)
    assert changed.tolist() == [[False, False, False, True, False]] * 2


def test_the_activation_is_the_only_thing_that_is_not_linear(randomize):
    x, y = torch.randn(2, 8, dtype=torch.float64)

    def excess(ffn):
        return ffn(x) + ffn(y) - ffn(x + y) - ffn(torch.zeros_like(x))

    ffn = randomize(PositionwiseFeedForward(8, 16).double())
    assert excess(ffn).abs().max() > 0.1
    ffn = randomize(PositionwiseFeedForward(8, 16, activation=lambda x: x).double())
    assert excess(ffn).abs().max() < 1e-12


def test_a_negative_hidden_feature_is_cut_off():
    ffn = PositionwiseFeedForward(1, 1)
    for parameter in ffn.parameters():
        nn.init.ones_(parameter)
    assert ffn(torch.tensor([[-3.0], [2.0]])).tolist() == [[1.0], [4.0]]


def test_dropout_drops_hidden_features_in_training_only(randomize):
    ffn = randomize(PositionwiseFeedForward(8, 16, dropout=0.5).double())
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(0)
    ours = ffn(x)
    torch.manual_seed(0)
    hidden = F.dropout(F.relu(ffn.linear1(x)), 0.5)
    assert torch.equal(ours, ffn.linear2(hidden))
    assert not torch.equal(ours, ffn.eval()(x))


def test_nothing_is_dropped_by_default():
    ffn = PositionwiseFeedForward(8)
    x = torch.randn(5, 8)
    assert torch.equal(ffn(x), ffn(x))


def test_dropping_everything_leaves_the_bias(randomize):
    ffn = randomize(PositionwiseFeedForward(8, dropout=1.0))
    assert torch.equal(ffn(torch.randn(5, 8)), ffn.linear2.bias.expand(5, 8))


def test_non_contiguous_inputs_work(randomize):
    ffn = randomize(PositionwiseFeedForward(8, 16).double())
    x = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous() and ffn(x).is_contiguous()
    torch.testing.assert_close(ffn(x), ffn(x.contiguous()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_it_compiles_to_one_graph(activation, compiles):
    compiles(PositionwiseFeedForward(8, activation=activation), (torch.randn(2, 5, 8),))


def test_autocast_and_meta_device_work(randomize):
    ffn = randomize(PositionwiseFeedForward(8, 16))
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = ffn(x)
    assert output.dtype == torch.bfloat16
    # 8 bits of sums of order 10
    torch.testing.assert_close(output.float(), ffn(x), atol=1e-1, rtol=3e-2)
    assert ffn.to("meta")(x.to("meta")).shape == (2, 5, 8)


@pytest.mark.parametrize(("d_model", "d_ff"), [(0, 4), (-1, 4), (4, 0), (4, -1)])
def test_sizes_below_one_are_refused(d_model, d_ff, refuses):
    message = f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}"
    with refuses(ValueError, message):
        PositionwiseFeedForward(d_model, d_ff)


def test_no_features_at_all_are_refused(refuses):
    with refuses(ValueError, "d_model and d_ff must be at least 1, got 0 and 0"):
        PositionwiseFeedForward(0)


def test_one_feature_is_enough():
    assert PositionwiseFeedForward(1, 1)(torch.ones(3, 1)).shape == (3, 1)


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_a_probability_outside_zero_and_one_is_refused(dropout):
    with pytest.raises(ValueError, match=f"dropout probability .* {dropout}"):
        PositionwiseFeedForward(8, dropout=dropout)


@pytest.mark.parametrize("shape", [(), (7,), (8, 7), (2, 8, 1)])
def test_another_number_of_features_is_refused(shape, refuses):
    with refuses(ValueError, f"x must be (..., 8), got {shape}"):
        PositionwiseFeedForward(8)(torch.zeros(shape))
