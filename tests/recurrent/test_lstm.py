"""The LSTM against nn.LSTM; what its gates do with the cell state."""

import math

import pytest
import torch
from torch import nn

from snippets.recurrent.lstm import LSTM

# B, T, input size, hidden size
SIZES = [(3, 5, 2, 4), (1, 7, 3, 3), (4, 1, 2, 5), (2, 3, 1, 1), (0, 3, 2, 4)]
SIZES += [(2, 200, 3, 4)]


def pair(randomize, sizes, dtype=torch.float64):
    """Ours and torch's layer with the same random weights."""
    ours = randomize(LSTM(*sizes)).to(dtype)
    theirs = nn.LSTM(*sizes, batch_first=True).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def ours_flat(layer):
    def call(x, *state):
        outputs, (h, c) = layer(x, state or None)
        return outputs, h, c

    return call


def theirs_flat(layer):
    """With our shape of the states: torch keeps one for each layer."""

    def call(x, *state):
        outputs, (h, c) = layer(x, tuple(s[None] for s in state) or None)
        return outputs, h[0], c[0]

    return call


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "state given"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_states_and_gradients_are_those_of_torch(
    size, given, randomize, agrees_with_gradients
):
    B, T, *sizes = size
    ours, theirs = pair(randomize, sizes)
    x = torch.randn(B, T, sizes[0]).double()
    state = torch.randn(2, B, sizes[1]).double().unbind() if given else ()
    agrees_with_gradients(
        ours_flat(ours),
        theirs_flat(theirs),
        x,
        *state,
        against="nn.LSTM",
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
def test_lower_precisions(dtype, atol, rtol, randomize, agrees_with_gradients):
    ours, theirs = pair(randomize, (2, 4), dtype)
    agrees_with_gradients(
        ours_flat(ours),
        theirs_flat(theirs),
        torch.randn(3, 5, 2, dtype=dtype),
        *torch.randn(2, 3, 4, dtype=dtype).unbind(),
        against="nn.LSTM",
        atol=atol,
        rtol=rtol,
        modules=(ours, theirs),
    )


@pytest.mark.parametrize("sizes", [(2, 4), (5, 1), (1, 9)], ids=str)
def test_the_same_seed_draws_the_weights_of_torchs_layer(sizes):
    torch.manual_seed(3)
    ours, after = LSTM(*sizes).state_dict(), torch.rand(())
    torch.manual_seed(3)
    theirs, after_theirs = nn.LSTM(*sizes).state_dict(), torch.rand(())
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))
    assert torch.equal(after, after_theirs)  # nothing more was drawn


def test_the_first_weights_are_uniform_within_one_over_the_root_of_the_hidden_size():
    lstm, bound = LSTM(7, 100), 1 / math.sqrt(100)
    for parameter in lstm.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert parameter.min() < 0 < parameter.max()


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, -2.5])
def test_a_forget_bias_is_the_sum_of_both_biases_and_changes_nothing_else(forget_bias):
    torch.manual_seed(3)
    drawn = LSTM(2, 3).state_dict()
    torch.manual_seed(3)
    lstm = LSTM(2, 3, forget_bias=forget_bias)
    set_to = lstm.state_dict()
    both = (set_to["bias_ih_l0"] + set_to["bias_hh_l0"])[3:6]
    assert both.tolist() == [forget_bias] * 3
    for name in drawn:
        for a, b in zip(drawn[name].chunk(4), set_to[name].chunk(4), strict=True):
            forget_gate = a.data_ptr() == drawn[name].chunk(4)[1].data_ptr()
            assert torch.equal(a, b) != (forget_gate and "bias" in name)
    assert all(parameter.requires_grad for parameter in lstm.parameters())


def gated(i, f, o, hidden_size=4):
    """An LSTM whose gates are open (True) or shut (False) whatever comes in."""
    lstm = LSTM(2, hidden_size)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        for part, open_ in zip((0, 1, 3), (i, f, o), strict=True):
            lstm.bias_ih_l0.view(4, -1)[part] = 200 if open_ else -200
    return lstm


def test_with_its_forget_gate_open_and_nothing_written_the_cell_stays_for_300_steps():
    c_0 = torch.randn(3, 4, requires_grad=True)
    _, (_, c) = gated(False, True, True)(
        torch.randn(3, 300, 2), (torch.zeros(3, 4), c_0)
    )
    assert torch.equal(c, c_0)
    (gradient,) = torch.autograd.grad(c.sum(), c_0)
    assert torch.equal(gradient, torch.ones(3, 4))


def test_a_shut_forget_gate_empties_the_cell():
    state = torch.randn(2, 3, 4).unbind()
    _, (h, c) = gated(False, False, True)(torch.randn(3, 1, 2), state)
    assert not c.any() and not h.any()


def test_a_shut_output_gate_hides_the_cell():
    state = torch.randn(2, 3, 4).unbind()
    outputs, (h, c) = gated(False, True, False)(torch.randn(3, 5, 2), state)
    assert not outputs.any() and not h.any() and torch.equal(c, state[1])


def test_an_open_input_gate_adds_to_the_cell():
    lstm = gated(True, True, True, hidden_size=1)
    with torch.no_grad():
        lstm.weight_ih_l0[2] = 100  # the candidate is the sign of the input
    x = torch.tensor([[[1.0, 0], [1, 0], [-1, 0], [1, 0]]])
    assert [lstm(x[:, :t])[1][1].item() for t in (1, 2, 3, 4)] == [1, 2, 1, 2]


def test_a_sequence_in_two_parts_gives_the_states_of_the_whole(randomize):
    lstm, _ = pair(randomize, (2, 4))
    x = torch.randn(3, 7, 2).double()
    outputs, state = lstm(x)
    first, between = lstm(x[:, :3])
    second, last = lstm(x[:, 3:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), outputs)
    torch.testing.assert_close(last, state)
    assert torch.equal(outputs[:, -1], state[0])


def test_later_inputs_do_not_change_earlier_states(randomize):
    lstm, _ = pair(randomize, (2, 4))
    x = torch.randn(1, 6, 2).double()
    y = x.clone()
    y[:, 2] += 1
    changed = (lstm(x)[0] != lstm(y)[0]).any(dim=-1)
    assert changed.tolist() == [[False, False, True, True, True, True]]


def test_the_state_is_as_large_after_a_hundred_steps_as_after_one():
    lstm = LSTM(2, 8)
    for T in (1, 10, 100):
        _, state = lstm(torch.randn(1, T, 2))
        assert sum(part.numel() for part in state) == 16


def test_inputs_that_are_not_contiguous_work(randomize):
    lstm, _ = pair(randomize, (2, 4))
    x = torch.randn(2, 5, 3).double().permute(2, 1, 0)
    state = torch.randn(4, 3, 2).double().permute(2, 1, 0).unbind()
    assert not x.is_contiguous() and not state[0].is_contiguous()
    found = lstm(x, state)
    expected = lstm(x.contiguous(), tuple(s.contiguous() for s in state))
    torch.testing.assert_close(found, expected)


def test_inputs_and_states_stay_as_they_are():
    x, state = torch.randn(3, 5, 2), torch.randn(2, 3, 4).unbind()
    before = x.clone(), *(s.clone() for s in state)
    LSTM(2, 4)(x, state)
    assert all(map(torch.equal, (x, *state), before))


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "state given"])
@pytest.mark.parametrize("T", [1, 5])
def test_autocast_rounds_where_torchs_layer_rounds(T, given, randomize, agrees):
    ours, theirs = pair(randomize, (2, 4), torch.float32)
    inputs = [torch.randn(3, T, 2), *torch.randn(2, 3, 4)][: 1 + 2 * given]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours_flat(ours)(*inputs), theirs_flat(theirs)(*inputs)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.bfloat16
        agrees(x, y, "nn.LSTM", atol=0.03, rtol=0.02)


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "state given"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_rounds_all_states_and_no_float64(dtype, given, randomize):
    # torch has no float16 kernel for processors: compared with float32 instead.
    lstm, _ = pair(randomize, (2, 4), torch.float32)
    inputs = [torch.randn(3, 5, 2), *torch.randn(2, 3, 4)][: 1 + 2 * given]
    exact = ours_flat(lstm)(*inputs)
    with torch.autocast("cpu", dtype):
        found = ours_flat(lstm)(*inputs)
        wide = ours_flat(lstm.double())(*(x.double() for x in inputs))
    for x, y, z in zip(found, exact, wide, strict=True):
        assert x.dtype == dtype and z.dtype == torch.float64
        torch.testing.assert_close(x.float(), y, atol=0.03, rtol=0.02)
        torch.testing.assert_close(z.float(), y)


def test_the_meta_device_works():
    lstm, x = LSTM(2, 4), torch.randn(3, 5, 2)
    outputs, (h, c) = lstm.to("meta")(x.to("meta"))
    assert outputs.shape == (3, 5, 4) and h.shape == c.shape == (3, 4)
    assert c.device.type == "meta"


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (-1, 4)], ids=str)
def test_sizes_below_one_are_refused(sizes, refuses):
    message = "input_size and hidden_size must be at least 1, got {} and {}"
    with refuses(ValueError, message.format(*sizes)):
        LSTM(*sizes)


@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 4), (3, 0, 2), (1, 3, 5, 2)], ids=str)
def test_inputs_of_another_shape_are_refused(shape, refuses):
    with refuses(ValueError, f"x must be (B, T, 2) with T >= 1, got {shape}"):
        LSTM(2, 4)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 4), (4,), (3, 2), (1, 4), (4, 3)], ids=str)
@pytest.mark.parametrize("name", ["h_0", "c_0"])
def test_states_of_another_shape_are_refused(name, shape, refuses):
    right, wrong = torch.zeros(3, 4), torch.zeros(shape)
    state = (wrong, right) if name == "h_0" else (right, wrong)
    with refuses(ValueError, f"{name} must be (3, 4), got {shape}"):
        LSTM(2, 4)(torch.zeros(3, 5, 2), state)


@pytest.mark.parametrize("B", [1, 3])
def test_what_is_returned_is_contiguous(B):
    x = torch.randn(2, 5, B).permute(2, 1, 0)
    for given in (x, x.contiguous()):
        found = ours_flat(LSTM(2, 4))(given)
        assert all(tensor.is_contiguous() for tensor in found)


def test_it_compiles_for_every_batch_size(compiles):
    compiles(LSTM(2, 4), *((torch.randn(B, 3, 2),) for B in (4, 3)))


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2}, {"bidirectional": True}, {"bias": False}, {"proj_size": 3}],
    ids=str,
)
def test_weights_that_do_not_all_fit_are_not_loaded(options):
    state = nn.LSTM(2, 4, **options).state_dict()
    with pytest.raises(RuntimeError, match="loading state_dict"):
        LSTM(2, 4).load_state_dict(state)


@pytest.mark.parametrize("lengths", [[3, 2], [2, 2]], ids=str)
def test_a_packed_sequence_is_refused(lengths, refuses):
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in lengths])
    with refuses(TypeError, "x must be a tensor, got a PackedSequence"):
        LSTM(2, 4)(packed)
