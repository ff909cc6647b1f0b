"""The transformer block against torch's encoder layer; what its two norms do."""

import pytest
import torch
from torch import nn

from snippets.attention.transformer_block import TransformerBlock

TORCH = "nn.TransformerEncoderLayer"

# B, T, d_model, num_heads, d_ff
SIZES = [
    (2, 5, 8, 2, 16),
    (3, 7, 12, 3, 5),
    (1, 1, 4, 1, 1),
    (1, 6, 6, 6, 24),
    (1, 3, 1, 1, 2),
]
MASKS = ["none", "bool (T, T)", "bool (B, H, T, T)", "padding"]
MASKS += ["float (T, T)", "float (B, 1, T, T)"]
BOTH_ORDERS = pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])


def random_masks(kind, size, dtype=torch.float64):
    """A mask of ours, and the one that means the same to torch's layer."""
    B, T, _, H, _ = size
    if kind == "none":
        return None, None
    name, _, shape = kind.partition(" ")
    shape = {"(T, T)": (T, T), "(B, 1, T, T)": (B, 1, T, T), "": (B, 1, 1, T)}.get(
        shape, (B, H, T, T)
    )
    if name == "float":
        mask = torch.randn(shape, dtype=dtype)
    else:
        mask = torch.rand(shape) < 0.6
        # torch's layer has no answer for a token that may attend to nothing.
        mask[..., 0] = True
    theirs = mask if len(shape) == 2 else mask.expand(B, H, T, T).flatten(0, 1)
    return mask, theirs if name == "float" else ~theirs


def pair(size, norm_first, randomize, dtype=torch.float64):
    ours = randomize(TransformerBlock(*size[2:], norm_first)).to(dtype)
    theirs = nn.TransformerEncoderLayer(
        *size[2:], dropout=0, batch_first=True, norm_first=norm_first
    ).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@BOTH_ORDERS
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_are_those_of_torch(
    size, kind, norm_first, randomize, agrees_with_gradients
):
    ours, theirs = pair(size, norm_first, randomize)
    mask, inverted = random_masks(kind, size)
    agrees_with_gradients(
        lambda x: ours(x, mask),
        lambda x: theirs(x, inverted),
        torch.randn(*size[:3], dtype=torch.float64),
        against=TORCH,
        atol=1e-10,
        modules=(ours, theirs),
    )


# A dozen sums of some ten products, one after the other, of numbers up to about 100: 24
# bits of them in float32, 8 in bfloat16 (where both sides round at the same places).
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.float32, 2e-4, 1e-4), (torch.bfloat16, 0.5, 0.1)]
)
@BOTH_ORDERS
@pytest.mark.parametrize("kind", MASKS)
def test_lower_precisions(
    kind, norm_first, dtype, atol, rtol, randomize, agrees_with_gradients
):
    size = 2, 5, 8, 2, 16
    ours, theirs = pair(size, norm_first, randomize, dtype)
    mask, inverted = random_masks(kind, size, dtype)
    agrees_with_gradients(
        lambda x: ours(x, mask),
        lambda x: theirs(x, inverted),
        torch.randn(*size[:3], dtype=dtype),
        against=TORCH,
        atol=atol,
        rtol=rtol,
        modules=(ours, theirs),
    )


@BOTH_ORDERS
def test_inference_agrees_with_torchs_fused_path(norm_first, randomize, agrees):
    size = 2, 5, 8, 2, 16
    ours, theirs = pair(size, norm_first, randomize)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask, inverted = random_masks("bool (T, T)", size)
    with torch.inference_mode():
        agrees(ours.eval()(x, mask), theirs.eval()(x, inverted), TORCH, atol=1e-10)


@BOTH_ORDERS
def test_a_seed_gives_the_weights_that_torch_would_give(norm_first):
    torch.manual_seed(3)
    ours = TransformerBlock(12, 3, 7, norm_first).state_dict()
    torch.manual_seed(3)
    theirs = nn.TransformerEncoderLayer(12, 3, 7, norm_first=norm_first).state_dict()
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))


def test_norm_comes_first_by_default():
    torch.manual_seed(3)
    default = TransformerBlock(8, 2, 16)
    torch.manual_seed(3)
    pre = TransformerBlock(8, 2, 16, norm_first=True)
    x = torch.randn(2, 5, 8)
    assert torch.equal(default(x), pre(x))


def test_post_norm_gives_every_token_mean_zero_and_variance_one():
    x = 3 + 5 * torch.randn(2, 5, 64, dtype=torch.float64)
    post = TransformerBlock(64, 4, 16, norm_first=False).double()(x)
    torch.testing.assert_close(post.mean(-1), torch.zeros(2, 5).double())
    # LayerNorm adds 1e-5 to the variance before it divides.
    variance = post.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones(2, 5).double(), atol=1e-4, rtol=0)
    pre = TransformerBlock(64, 4, 16, norm_first=True).double()(x)
    assert (pre.mean(-1) > 1).all()


def test_sub_layers_that_add_nothing_leave_the_pre_norm_input_alone():
    block = TransformerBlock(8, 2, 16)
    for layer in (block.self_attn.out_proj, block.linear2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x), x)


@BOTH_ORDERS
def test_future_tokens_do_not_change_the_past(norm_first, randomize):
    block, _ = pair((2, 6, 8, 2, 16), norm_first, randomize)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 4:] = torch.randn(2, 2, 8)
    before, after = block(x, causal), block(y, causal)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-12, rtol=0)
    assert not torch.isclose(before[:, 4:], after[:, 4:]).any()
    assert not torch.allclose(block(x)[:, :4], block(y)[:, :4])


@BOTH_ORDERS
def test_permuted_tokens_give_permuted_outputs(norm_first, randomize):
    block, _ = pair((2, 6, 8, 2, 16), norm_first, randomize)
    x, order = torch.randn(2, 6, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]))


@BOTH_ORDERS
def test_sequences_of_a_batch_do_not_see_each_other(norm_first, randomize):
    block, _ = pair((3, 6, 8, 2, 16), norm_first, randomize)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    alone = torch.cat([block(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(block(x), alone)


def test_padded_tokens_do_not_change_the_others(randomize):
    block, _ = pair((2, 6, 8, 2, 16), True, randomize)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([[6], [4]])  # (B, T)
    output = block(x, valid[:, None, None])
    torch.testing.assert_close(output[:1], block(x[:1]))
    torch.testing.assert_close(output[1:, :4], block(x[1:, :4]))


@BOTH_ORDERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (2, 2, 5, 5)])
@pytest.mark.parametrize("kind", [bool, float])
def test_a_token_that_may_attend_to_nothing_gets_the_output_bias(
    kind, shape, training, norm_first, randomize
):
    block, _ = pair((2, 5, 8, 2, 16), norm_first, randomize)
    block.train(training)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 1, :] = False
    if kind is float:
        mask = torch.zeros(shape).masked_fill(~mask, -torch.inf).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    output = block(x, mask)
    alone = x[:, 1] + block.self_attn.out_proj.bias
    if norm_first:
        expected = alone + block.linear2(block.linear1(block.norm2(alone)).relu())
    else:
        alone = block.norm1(alone)
        expected = block.norm2(alone + block.linear2(block.linear1(alone).relu()))
    torch.testing.assert_close(output[:, 1], expected)
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *block.parameters()))


@BOTH_ORDERS
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_inputs_work(shape, norm_first, training):
    block = TransformerBlock(8, 2, 16, norm_first).train(training)
    with torch.no_grad():
        assert block(torch.zeros(shape)).shape == shape


@BOTH_ORDERS
def test_non_contiguous_inputs_work_and_stay_as_they_are(norm_first, randomize):
    block, _ = pair((2, 5, 8, 2, 16), norm_first, randomize)
    x = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    copy = x.clone()
    assert not x.is_contiguous() and block(x).is_contiguous()
    torch.testing.assert_close(block(x), block(x.contiguous()))
    assert torch.equal(x, copy)


@BOTH_ORDERS
@pytest.mark.parametrize("kind", MASKS)
def test_it_compiles_to_one_graph(kind, norm_first, randomize, compiles):
    size = 2, 5, 8, 2, 16
    block, _ = pair(size, norm_first, randomize)
    mask, _ = random_masks(kind, size)
    compiles(lambda x: block(x, mask), torch.randn(2, 5, 8, dtype=torch.float64))


@BOTH_ORDERS
def test_autocast_and_meta_device_work(norm_first):
    block, x = TransformerBlock(8, 2, 16, norm_first), torch.randn(2, 5, 8)
    exact = block(x)
    mask = torch.zeros(5, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x, mask)
    assert output.dtype == torch.float32
    # 8 bits, for numbers of order 1 to 4
    torch.testing.assert_close(output.float(), exact, atol=5e-2, rtol=5e-2)
    assert block.to("meta")(x.to("meta")).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("d_model", "num_heads"),
    [(10, 3), (4, 8), (0, 1), (0, 0), (4, 0), (-4, 2), (4, -2)],
)
def test_heads_that_do_not_divide_the_features_are_refused(d_model, num_heads, refuses):
    message = f"d_model={d_model} must be a positive multiple of num_heads={num_heads}"
    with refuses(ValueError, message):
        TransformerBlock(d_model, num_heads, 16)


@pytest.mark.parametrize("d_ff", [0, -1])
def test_an_empty_hidden_layer_is_refused(d_ff, refuses):
    with refuses(ValueError, f"d_ff must be at least 1, got {d_ff}"):
        TransformerBlock(8, 2, d_ff)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (2, 3, 5, 8), (8,), ()])
def test_inputs_that_do_not_fit_are_refused(shape, refuses):
    with refuses(ValueError, f"x must be (B, T, 8), got {shape}"):
        TransformerBlock(8, 2, 16)(torch.zeros(shape))


# (3, 5, 5) and (2, 5, 5): masks of a batch or of the heads? (6, 5, 5) is torch's way.
@pytest.mark.parametrize(
    "shape",
    [
        *[(), (5,), (5, 4), (4, 4), (3, 5, 5), (2, 5, 5), (6, 5, 5), (1, 5, 5)],
        *[(3, 2, 5, 4), (3, 3, 5, 5), (2, 2, 5, 5), (2, 3, 5, 5), (1, 3, 2, 5, 5)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_that_do_not_fit_are_refused(shape, dtype, refuses):
    message = f"attn_mask must be 2-D or 4-D and broadcast to (3, 2, 5, 5), got {shape}"
    with refuses(ValueError, message):
        TransformerBlock(8, 2, 16)(torch.zeros(3, 5, 8), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(1, 5), (5, 1), (1, 1), (1, 1, 5, 5), (3, 1, 1, 5), (1, 2, 5, 1)]
)
def test_masks_broadcast(shape, randomize):
    block, _ = pair((3, 5, 8, 2, 16), True, randomize)
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), torch.rand(shape) < 0.6
    torch.testing.assert_close(block(x, mask), block(x, mask.expand(3, 2, 5, 5)))


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_float_mask_of_any_precision_is_added(dtype, mask_dtype, randomize):
    block, _ = pair((2, 5, 8, 2, 16), True, randomize, dtype)
    x, mask = torch.randn(2, 5, 8, dtype=dtype), torch.randn(5, 5, dtype=mask_dtype)
    assert torch.equal(block(x, mask), block(x, mask.to(dtype)))
    assert not torch.equal(block(x, mask), block(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
def test_masks_that_are_neither_bool_nor_float_are_refused(dtype, refuses):
    x, mask = torch.zeros(2, 5, 8), torch.ones(5, 5, dtype=dtype)
    with refuses(TypeError, f"attn_mask must be bool or float, got {dtype}"):
        TransformerBlock(8, 2, 16)(x, mask)
