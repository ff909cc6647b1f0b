"""The recurrent network against nn.RNN; what keeps its state and its gradient alive."""

import math

import pytest
import torch
from torch import nn

from snippets.recurrent.rnn import RNN, irnn_init_

KINDS = ["tanh", "relu"]
kinds = pytest.mark.parametrize("kind", KINDS)
# B, T, input size, hidden size
SIZES = [(3, 5, 2, 4), (1, 7, 3, 3), (4, 1, 2, 5), (2, 3, 1, 1), (0, 3, 2, 4)]
SIZES += [(2, 200, 3, 4)]


def pair(randomize, sizes, kind="tanh", dtype=torch.float64):
    """Ours and torch's layer with the same random weights."""
    ours = randomize(RNN(*sizes, nonlinearity=kind)).to(dtype)
    theirs = nn.RNN(*sizes, nonlinearity=kind, batch_first=True).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(layer):
    """torch's layer with our shape of the states: it keeps one for each layer."""

    def call(x, h_0=None):
        outputs, h = layer(x, None if h_0 is None else h_0[None])
        return outputs, h[0]

    return call


# Two hundred steps of a ReLU network with random weights grow beyond any precision.
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "h_0 given"])
@pytest.mark.parametrize(
    ("size", "kind"),
    [(size, kind) for size in SIZES for kind in KINDS if size[1] < 9 or kind == "tanh"],
    ids=str,
)
def test_states_and_gradients_are_those_of_torch(
    size, kind, given, randomize, agrees_with_gradients
):
    B, T, *sizes = size
    ours, theirs = pair(randomize, sizes, kind)
    inputs = [torch.randn(B, T, sizes[0]), torch.randn(B, sizes[1])][: 1 + given]
    agrees_with_gradients(
        ours,
        flat(theirs),
        *[x.double() for x in inputs],
        against="nn.RNN",
        atol=1e-12,
        modules=(ours, theirs),
    )


# Five steps of sums of six products of order 1, and gradients that add up fifteen of
# them: 24 bits of each in float32, 8 in bfloat16.
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.float32, 2e-6, 2e-6), (torch.bfloat16, 0.03, 0.02)],
    ids=str,
)
@kinds
def test_lower_precisions(kind, dtype, atol, rtol, randomize, agrees_with_gradients):
    ours, theirs = pair(randomize, (2, 4), kind, dtype)
    agrees_with_gradients(
        ours,
        flat(theirs),
        torch.randn(3, 5, 2, dtype=dtype),
        torch.randn(3, 4, dtype=dtype),
        against="nn.RNN",
        atol=atol,
        rtol=rtol,
        modules=(ours, theirs),
    )


@pytest.mark.parametrize("sizes", [(2, 4), (5, 1), (1, 9)], ids=str)
def test_the_same_seed_draws_the_weights_of_torchs_layer(sizes):
    torch.manual_seed(3)
    ours, after = RNN(*sizes).state_dict(), torch.rand(())
    torch.manual_seed(3)
    theirs, after_theirs = nn.RNN(*sizes).state_dict(), torch.rand(())
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))
    assert torch.equal(after, after_theirs)  # nothing more was drawn


def test_it_is_a_tanh_network_unless_told_otherwise():
    rnn, x = RNN(2, 3), torch.randn(4, 6, 2)
    same = RNN(2, 3, nonlinearity="tanh")
    same.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], same(x)[0])
    assert RNN(2, 3, "relu")(x)[0].min() == 0


@kinds
def test_a_sequence_in_two_parts_gives_the_states_of_the_whole(kind, randomize):
    rnn, _ = pair(randomize, (2, 4), kind)
    x = torch.randn(3, 7, 2).double()
    outputs, h = rnn(x)
    first, between = rnn(x[:, :3])
    second, last = rnn(x[:, 3:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), outputs)
    torch.testing.assert_close(last, h)


def test_the_last_state_is_the_last_output(randomize):
    rnn, _ = pair(randomize, (2, 4))
    outputs, h = rnn(torch.randn(3, 7, 2).double())
    assert torch.equal(outputs[:, -1], h)


def test_later_inputs_do_not_change_earlier_states_and_earlier_ones_change_all(
    randomize,
):
    rnn, _ = pair(randomize, (2, 4))
    x = torch.randn(1, 6, 2).double()
    y = x.clone()
    y[:, 2] += 1
    changed = (rnn(x)[0] != rnn(y)[0]).any(dim=-1)
    assert changed.tolist() == [[False, False, True, True, True, True]]


def test_the_weights_do_not_depend_on_the_length():
    rnn = RNN(2, 4)
    assert sum(p.numel() for p in rnn.parameters()) == 4 * 2 + 4 * 4 + 4 + 4
    for T in (1, 10, 100):
        outputs, h = rnn(torch.randn(3, T, 2))
        assert outputs.shape == (3, T, 4) and h.shape == (3, 4)


def test_the_gradient_is_the_product_of_the_steps_jacobians(randomize):
    rnn, _ = pair(randomize, (2, 4))
    x, h_0 = torch.randn(1, 5, 2).double(), torch.randn(1, 4).double()
    product = torch.eye(4, dtype=torch.float64)
    for h in rnn(x, h_0)[0][0]:
        product = (1 - h**2)[:, None] * rnn.weight_hh_l0 @ product  # diag(f') W_hh
    jacobian = torch.autograd.functional.jacobian(lambda h: rnn(x, h)[1][0], h_0)
    torch.testing.assert_close(jacobian[:, 0], product.detach())


def test_identity_initialization_copies_the_state_a_thousand_steps():
    rnn = irnn_init_(RNN(2, 4, "relu"))
    h_0 = torch.rand(3, 4, requires_grad=True)
    _, h = rnn(torch.zeros(3, 1000, 2), h_0)
    assert torch.equal(h, h_0)
    (gradient,) = torch.autograd.grad(h.sum(), h_0)
    assert torch.equal(gradient, torch.ones(3, 4))


def test_identity_initialization_adds_up_what_the_inputs_say():
    rnn = irnn_init_(RNN(1, 1, "relu"))
    nn.init.ones_(rnn.weight_ih_l0)
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert rnn(x)[0].flatten().tolist() == [1, 3, 6]


def test_identity_initialization_keeps_the_inputs_weights_and_returns_the_network():
    rnn = RNN(2, 4)
    before = rnn.weight_ih_l0.clone()
    assert irnn_init_(rnn, 0.5) is rnn
    assert torch.equal(rnn.weight_ih_l0, before)
    assert torch.equal(rnn.weight_hh_l0, 0.5 * torch.eye(4))
    assert not rnn.bias_ih_l0.any() and not rnn.bias_hh_l0.any()
    assert all(parameter.requires_grad for parameter in rnn.parameters())


def test_identity_initialization_reaches_every_layer_and_direction_of_torchs_network():
    rnn = irnn_init_(nn.RNN(2, 4, num_layers=2, bidirectional=True))
    for name, parameter in rnn.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        elif "weight_hh" in name:
            assert torch.equal(parameter, torch.eye(4))
        else:
            assert parameter.any()


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.LSTM(2, 4), [(16, 4)]),
        (nn.GRU(2, 4, num_layers=2), [(12, 4), (12, 4)]),
        (nn.Linear(4, 4), []),
        (nn.ModuleList([nn.RNN(2, 3), nn.GRU(2, 2)]), [(3, 3), (6, 2)]),
    ],
    ids=["LSTM", "GRU", "Linear", "mixed"],
)
def test_what_is_no_plain_recurrent_network_is_refused_and_left_as_it_is(
    layer, shapes, refuses
):
    before = [parameter.clone() for parameter in layer.parameters()]
    message = f"rnn must have square recurrent matrices, got {shapes}"
    with refuses(ValueError, message):
        irnn_init_(layer)
    assert all(map(torch.equal, layer.parameters(), before))


def test_the_first_weights_are_uniform_within_one_over_the_root_of_the_hidden_size():
    rnn, bound = RNN(7, 100), 1 / math.sqrt(100)
    for parameter in rnn.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert parameter.min() < 0 < parameter.max()


def test_inputs_that_are_not_contiguous_work(randomize):
    rnn, _ = pair(randomize, (2, 4))
    x, h_0 = torch.randn(2, 5, 3).double().permute(2, 1, 0), torch.randn(4, 3).T
    assert not x.is_contiguous() and not h_0.is_contiguous()
    found = rnn(x, h_0.double())
    expected = rnn(x.contiguous(), h_0.double().contiguous())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_that_is_given_stays_as_it_is():
    x, h_0 = torch.randn(3, 5, 2), torch.randn(3, 4)
    before = x.clone(), h_0.clone()
    RNN(2, 4)(x, h_0)
    assert torch.equal(x, before[0]) and torch.equal(h_0, before[1])


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "h_0 given"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@kinds
def test_autocast_rounds_where_torchs_layer_rounds(
    kind, dtype, given, randomize, agrees
):
    ours, theirs = pair(randomize, (2, 4), kind, torch.float32)
    inputs = [torch.randn(3, 5, 2), torch.randn(3, 4)][: 1 + given]
    with torch.autocast("cpu", dtype):
        for x, y in zip(ours(*inputs), flat(theirs)(*inputs), strict=True):
            assert x.dtype == dtype
            agrees(x, y, "nn.RNN", atol=0.03, rtol=0.02)


def test_the_meta_device_works():
    rnn, x = RNN(2, 4), torch.randn(3, 5, 2)
    outputs, h = rnn.to("meta")(x.to("meta"))
    assert outputs.shape == (3, 5, 4) and h.device.type == "meta"


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (-1, 4)], ids=str)
def test_sizes_below_one_are_refused(sizes, refuses):
    message = "input_size and hidden_size must be at least 1, got {} and {}"
    with refuses(ValueError, message.format(*sizes)):
        RNN(*sizes)


def test_another_nonlinearity_is_refused(refuses):
    with refuses(ValueError, "nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        RNN(2, 4, "gelu")


@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 4), (3, 0, 2), (1, 3, 5, 2)], ids=str)
def test_inputs_of_another_shape_are_refused(shape, refuses):
    with refuses(ValueError, f"x must be (B, T, 2) with T >= 1, got {shape}"):
        RNN(2, 4)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 4), (4,), (3, 2), (1, 4), (4, 3)], ids=str)
def test_states_of_another_shape_are_refused(shape, refuses):
    with refuses(ValueError, f"h_0 must be (3, 4), got {shape}"):
        RNN(2, 4)(torch.zeros(3, 5, 2), torch.zeros(shape))


@pytest.mark.parametrize("B", [1, 3])
def test_what_is_returned_is_contiguous(B):
    x = torch.randn(2, 5, B).permute(2, 1, 0)
    for given in (x, x.contiguous()):
        found = RNN(2, 4)(given)
        assert all(tensor.is_contiguous() for tensor in found)


def test_it_compiles_for_every_batch_size(compiles):
    compiles(RNN(2, 4), *((torch.randn(B, 3, 2),) for B in (4, 3)))


@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"bidirectional": True}, {"bias": False}], ids=str
)
def test_weights_that_do_not_all_fit_are_not_loaded(options):
    state = nn.RNN(2, 4, **options).state_dict()
    with pytest.raises(RuntimeError, match="loading state_dict"):
        RNN(2, 4).load_state_dict(state)


@pytest.mark.parametrize("lengths", [[3, 2], [2, 2]], ids=str)
def test_a_packed_sequence_is_refused(lengths, refuses):
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in lengths])
    with refuses(TypeError, "x must be a tensor, got a PackedSequence"):
        RNN(2, 4)(packed)
