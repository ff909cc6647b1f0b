"""The residual connection: what the identity path keeps, in values and gradients."""

import pytest
import torch
from torch import nn

from snippets.attention.residual import Residual


def branch(dim):
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))


# One addition on either side: nothing to differ in, whatever the precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 3, 8), (1, 8), (0, 8)])
def test_values_and_gradients_are_those_of_the_sum(
    shape, dtype, randomize, agrees_with_gradients
):
    fn = randomize(branch(8)).to(dtype)
    agrees_with_gradients(
        Residual(fn),
        lambda x: x + fn(x),
        torch.randn(shape, dtype=dtype),
        against="x + F(x)",
        atol=0,
        modules=(fn, fn),
    )


def test_a_shortcut_projects_the_input(randomize, agrees_with_gradients):
    fn, shortcut = randomize(nn.Linear(8, 5)), randomize(nn.Linear(8, 5, bias=False))
    block = Residual(fn, shortcut).double()
    agrees_with_gradients(
        block,
        lambda x: shortcut(x) + fn(x),
        torch.randn(3, 8, dtype=torch.float64),
        against="W_s x + F(x)",
        atol=0,
        modules=(block, block),
    )


def test_agrees_with_the_feed_forward_half_of_torchs_layer(
    randomize, agrees_with_gradients
):
    layer = randomize(nn.TransformerEncoderLayer(8, 2, 16, 0, norm_first=True)).double()
    ours = Residual(nn.Sequential(layer.norm2, layer.linear1, nn.ReLU(), layer.linear2))
    # Attention that adds nothing leaves x + FFN(Norm(x)).
    for parameter in layer.self_attn.out_proj.parameters():
        nn.init.zeros_(parameter)
    agrees_with_gradients(
        ours,
        layer,
        torch.randn(3, 5, 8, dtype=torch.float64),
        against="nn.TransformerEncoderLayer",
        atol=1e-10,
    )


def test_branches_of_zeros_pass_the_input_and_its_gradient_through_fifty_blocks():
    blocks = []
    for _ in range(50):
        fn = branch(8)
        for parameter in fn[-1].parameters():
            nn.init.zeros_(parameter)
        blocks.append(Residual(fn))
    x = torch.randn(3, 8, requires_grad=True)
    output = nn.Sequential(*blocks)(x)
    assert torch.equal(output, x)
    output.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


def test_the_jacobian_is_that_of_the_branch_plus_the_identity(randomize):
    fn = randomize(branch(6)).double()
    x = torch.randn(6, dtype=torch.float64)
    whole = torch.autograd.functional.jacobian(Residual(fn), x)
    part = torch.autograd.functional.jacobian(fn, x)
    torch.testing.assert_close(whole, torch.eye(6).double() + part)


def test_a_function_without_parameters_is_a_branch_too():
    x = torch.randn(3, 8)
    assert torch.equal(Residual(torch.sin)(x), x + x.sin())
    assert torch.equal(Residual(torch.sin, torch.cos)(x), x.cos() + x.sin())


def test_state_dict_names_the_branch_and_the_shortcut():
    block = Residual(nn.Linear(8, 5), nn.Linear(8, 5, bias=False))
    assert list(block.state_dict()) == ["fn.weight", "fn.bias", "shortcut.weight"]
    assert list(Residual(nn.Linear(8, 8)).state_dict()) == ["fn.weight", "fn.bias"]


def test_the_input_is_not_modified_and_need_not_be_contiguous():
    x = torch.randn(8, 3).T
    copy = x.clone()
    assert not x.is_contiguous()
    output = Residual(torch.sin)(x)
    assert torch.equal(output, x.contiguous() + x.contiguous().sin())
    assert torch.equal(x, copy) and output.is_contiguous()


@pytest.mark.parametrize("shortcut", [None, nn.Linear(8, 5)])
def test_it_compiles_to_one_graph(shortcut, compiles):
    fn = nn.Linear(8, 8 if shortcut is None else 5)
    compiles(Residual(fn, shortcut), torch.randn(3, 8))


def test_autocast_and_meta_device_work():
    block = Residual(nn.Linear(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(3, 8)).dtype == torch.float32
    assert block.to("meta")(torch.empty(3, 8, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("width", [1, 4])
def test_a_branch_of_another_shape_is_refused(width, refuses):
    message = f"fn must return the shape of the shortcut, (4, 8), got (4, {width})"
    with refuses(ValueError, message):
        Residual(nn.Linear(8, width))(torch.randn(4, 8))


def test_a_shortcut_of_another_shape_is_refused(refuses):
    message = "fn must return the shape of the shortcut, (4, 1), got (4, 8)"
    with refuses(ValueError, message):
        Residual(nn.Linear(8, 8), nn.Linear(8, 1))(torch.randn(4, 8))


def test_branches_that_return_no_tensor_are_refused(refuses):
    x = torch.randn(2, 3, 8)
    with refuses(TypeError, "fn must return a tensor, got tuple"):
        Residual(nn.LSTM(8, 8))(x)
    with refuses(TypeError, "shortcut must return a tensor, got tuple"):
        Residual(nn.Linear(8, 8), nn.LSTM(8, 8))(x)
    packed = nn.utils.rnn.pack_sequence([x[0]])
    with refuses(TypeError, "fn must return a tensor, got PackedSequence"):
        Residual(lambda x: x)(packed)
