"""Multi-head attention against torch's module; what heads and projections do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.attention.multi_head import MultiHeadAttention

TORCH = "nn.MultiheadAttention"

# B, L, S, embed_dim, num_heads
SIZES = [
    (2, 5, 5, 8, 2),
    (3, 5, 7, 12, 4),
    (3, 7, 5, 12, 3),
    (1, 1, 1, 4, 1),
    (1, 4, 6, 6, 6),
    (1, 1, 6, 1, 1),
]
MASKS = ["none", "causal", "bool (L, S)", "bool (B, 1, L, S)", "bool (B, H, L, S)"]
MASKS += ["float (L, S)", "float (B, 1, L, S)", "float (B, H, L, S)", "padding"]


def random_inputs(size, dtype=torch.float64):
    B, L, S, E, _ = size
    return [torch.randn(B, length, E, dtype=dtype) for length in (L, S, S)]


def options(kind, size, dtype=torch.float64):
    """The arguments of ours, and the mask that means the same to torch's module."""
    B, L, S, _, H = size
    if kind == "none":
        return {}, None
    if kind == "causal":
        return {"is_causal": True}, torch.ones(L, S, dtype=torch.bool).triu(1)
    name, _, shape = kind.partition(" ")
    shape = {"(L, S)": (L, S), "(B, 1, L, S)": (B, 1, L, S), "": (B, 1, 1, S)}.get(
        shape, (B, H, L, S)
    )
    if name == "float":
        mask = torch.randn(shape, dtype=dtype)
    else:
        mask = torch.rand(shape) < 0.6
        # Without any key torch's module returns NaN weights: not to be copied.
        mask[..., 0] = True
    theirs = mask if len(shape) == 2 else mask.expand(B, H, L, S).flatten(0, 1)
    return {"attn_mask": mask}, theirs if name == "float" else ~theirs


def pair(size, randomize, bias=True, dtype=torch.float64):
    ours = randomize(MultiHeadAttention(*size[3:], bias=bias)).to(dtype)
    theirs = nn.MultiheadAttention(*size[3:], bias=bias, batch_first=True).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_weights_and_gradients_are_those_of_torch(
    size, kind, bias, randomize, agrees_with_gradients
):
    ours, theirs = pair(size, randomize, bias)
    chosen, mask = options(kind, size)
    agrees_with_gradients(
        lambda *inputs: ours(*inputs, **chosen, need_weights=True),
        lambda *inputs: theirs(*inputs, attn_mask=mask, average_attn_weights=False),
        *random_inputs(size),
        against=TORCH,
        atol=1e-10,
        modules=(ours, theirs),
    )


# Sums of some ten products of order 1 to 10, four after one another: 24 bits of each in
# float32. bfloat16 keeps 8, so each of them is off by up to 0.04; torch's module takes
# other steps where it returns weights, and so rounds elsewhere.
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.float32, 5e-5, 1e-5), (torch.bfloat16, 0.6, 0.1)]
)
@pytest.mark.parametrize("kind", MASKS)
def test_lower_precisions(kind, dtype, atol, rtol, randomize, agrees_with_gradients):
    size = 3, 5, 7, 12, 4
    ours, theirs = pair(size, randomize, dtype=dtype)
    chosen, mask = options(kind, size, dtype)
    agrees_with_gradients(
        lambda *inputs: ours(*inputs, **chosen, need_weights=True),
        lambda *inputs: theirs(*inputs, attn_mask=mask, average_attn_weights=False),
        *random_inputs(size, dtype),
        against=TORCH,
        atol=atol,
        rtol=rtol,
        modules=(ours, theirs),
    )


def test_key_is_query_and_value_is_key_unless_given(randomize):
    size = 2, 5, 5, 8, 2
    ours, _ = pair(size, randomize)
    q, k, v = random_inputs(size)
    for call in (ours, ours.heads):
        assert torch.equal(call(q), call(q, q, q))
        assert torch.equal(call(q, k), call(q, k, k))
        assert torch.equal(call(q, value=v), call(q, q, v))
        assert not torch.allclose(call(q, k, v), call(q, k))
        assert not torch.allclose(call(q, k), call(q))


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_the_weights_that_torch_would_give(bias):
    torch.manual_seed(3)
    ours = MultiHeadAttention(12, 4, bias=bias).state_dict()
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 4, bias=bias).state_dict()
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_load_from_torch_and_back(bias):
    ours, theirs = (
        MultiHeadAttention(8, 2, bias),
        nn.MultiheadAttention(8, 2, bias=bias),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_biases_are_there_by_default():
    assert MultiHeadAttention(8, 2).state_dict().keys() == {
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    }


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(8, 2), (12, 4), (64, 8)])
def test_heads_side_by_side_are_as_wide_as_the_input(embed_dim, num_heads):
    ours, x = MultiHeadAttention(embed_dim, num_heads), torch.randn(2, 5, embed_dim)
    heads = ours.heads(x)
    assert heads.shape == (2, num_heads, 5, embed_dim // num_heads)
    assert heads.transpose(1, 2).flatten(2).shape == x.shape
    assert ours.out_proj.weight.shape == (embed_dim, embed_dim)


@pytest.mark.parametrize("kind", MASKS)
def test_output_is_a_sum_over_the_heads(kind, randomize):
    size = 3, 5, 7, 12, 4
    ours, _ = pair(size, randomize)
    chosen, _ = options(kind, size)
    inputs = random_inputs(size)
    heads = ours.heads(*inputs, **chosen).unbind(1)
    blocks = ours.out_proj.weight.split(3, dim=1)
    total = sum(head @ block.T for head, block in zip(heads, blocks, strict=True))
    torch.testing.assert_close(
        ours(*inputs, **chosen), total + ours.out_proj.bias, atol=1e-10, rtol=0
    )


def test_each_head_is_an_attention_of_its_own(randomize, agrees):
    size = 3, 5, 7, 12, 4
    ours, _ = pair(size, randomize)
    inputs = random_inputs(size)
    rows, biases = (
        ours.in_proj_weight.view(3, 4, 3, 12),
        ours.in_proj_bias.view(3, 4, 3),
    )
    for head in range(4):
        projected = (
            F.linear(x, rows[i, head], biases[i, head]) for i, x in enumerate(inputs)
        )
        expected = F.scaled_dot_product_attention(*projected)
        found = ours.heads(*inputs)[:, head]
        agrees(found, expected, "F.scaled_dot_product_attention", atol=1e-10)


def test_heads_do_not_see_each_other(randomize):
    ours, _ = pair((2, 5, 5, 8, 2), randomize)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    heads, (_, weights) = ours.heads(x), ours(x, need_weights=True)
    with torch.no_grad():
        ours.in_proj_weight.view(3, 2, 4, 8)[:, 0] += 1
    changed, (_, changed_weights) = ours.heads(x), ours(x, need_weights=True)
    torch.testing.assert_close(heads[:, 1], changed[:, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(weights[:, 1], changed_weights[:, 1], atol=1e-12, rtol=0)
    assert not torch.allclose(heads[:, 0], changed[:, 0])
    assert not torch.allclose(weights[:, 0], changed_weights[:, 0])


@pytest.mark.parametrize("kind", MASKS)
def test_weights_are_what_the_heads_are_made_of(kind, randomize):
    size = 3, 5, 7, 12, 4
    ours, _ = pair(size, randomize)
    chosen, _ = options(kind, size)
    q, k, v = random_inputs(size)
    output, weights = ours(q, k, v, **chosen, need_weights=True)
    values = F.linear(v, ours.in_proj_weight[24:], ours.in_proj_bias[24:])
    values = values.view(3, 7, 4, 3).transpose(1, 2)
    heads = ours.heads(q, k, v, **chosen)
    torch.testing.assert_close(weights @ values, heads, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(3, 4, 5).double(), atol=1e-10, rtol=0
    )
    assert torch.equal(output, ours(q, k, v, **chosen))


def test_future_tokens_do_not_change_the_past(randomize):
    ours, _ = pair((2, 6, 6, 8, 2), randomize)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 4:] = torch.randn(2, 2, 8)
    before, after = ours(x, is_causal=True), ours(y, is_causal=True)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-12, rtol=0)
    assert not torch.isclose(before[:, 4:], after[:, 4:]).any()


def test_permuted_tokens_give_permuted_outputs(randomize):
    ours, _ = pair((2, 6, 6, 8, 2), randomize)
    x, order = torch.randn(2, 6, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(ours(x)[:, order], ours(x[:, order]))


@pytest.mark.parametrize("kind", [bool, float])
def test_a_query_that_may_attend_to_nothing_gets_the_output_bias(kind, randomize):
    size = 2, 3, 7, 8, 2
    ours, _ = pair(size, randomize)
    allowed = torch.ones(3, 7, dtype=torch.bool)
    allowed[1] = False
    mask = allowed
    if kind is float:
        mask = torch.zeros(3, 7, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    inputs = [x.requires_grad_() for x in random_inputs(size)]
    output, weights = ours(*inputs, attn_mask=mask, need_weights=True)
    assert (weights[:, :, 1] == 0).all() and (weights[:, :, [0, 2]] > 0).all()
    assert torch.equal(output[:, 1], ours.out_proj.bias.expand(2, 8))
    (output.sum() + weights.square().sum()).backward()
    leaves = [*inputs, *ours.parameters()]
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("kind", MASKS[:2])
def test_empty_inputs_work(B, L, S, kind, randomize):
    ours, _ = pair((B, L, S, 8, 2), randomize)
    chosen, _ = options(kind, (B, L, S, 8, 2))
    inputs = random_inputs((B, L, S, 8, 2))
    output, weights = ours(*inputs, **chosen, need_weights=True)
    assert output.shape == (B, L, 8) and weights.shape == (B, 2, L, S)
    if S == 0:
        assert torch.equal(output, ours.out_proj.bias.expand(B, L, 8))


def test_non_contiguous_inputs_work(randomize):
    ours, _ = pair((2, 5, 7, 8, 2), randomize)
    q = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    k = torch.randn(7, 2, 8, dtype=torch.float64).transpose(0, 1)
    mask = (torch.rand(7, 5) < 0.6).T
    assert not any(x.is_contiguous() for x in (q, k, mask))
    torch.testing.assert_close(
        ours(q, k, attn_mask=mask),
        ours(q.contiguous(), k.contiguous(), attn_mask=mask.contiguous()),
    )


def test_inputs_are_not_modified(randomize):
    size = 2, 5, 7, 8, 2
    ours, _ = pair(size, randomize)
    inputs = *random_inputs(size), torch.rand(5, 7) < 0.6
    copies = [x.clone() for x in inputs]
    ours(*inputs, need_weights=True)
    assert all(map(torch.equal, inputs, copies))


def test_autocast_works(randomize):
    size = 2, 5, 7, 8, 2
    ours, _ = pair(size, randomize, dtype=torch.float32)
    inputs = random_inputs(size, torch.float32)
    exact, exact_weights = ours(*inputs, need_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = ours(*inputs, need_weights=True)
    assert output.dtype == weights.dtype == torch.bfloat16
    # 8 bits, for sums of order 1 to 10
    torch.testing.assert_close(output.float(), exact, atol=0.1, rtol=0.05)
    torch.testing.assert_close(weights.float(), exact_weights, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", MASKS[:2])
def test_device_follows_the_inputs(kind):
    size = 2, 5, 7, 8, 2
    chosen, _ = options(kind, size)
    ours = MultiHeadAttention(8, 2).to("meta")
    inputs = [x.to("meta") for x in random_inputs(size, torch.float32)]
    output, weights = ours(*inputs, **chosen, need_weights=True)
    assert output.shape == (2, 5, 8) and weights.shape == (2, 2, 5, 7)
    assert output.device.type == weights.device.type == "meta"


@pytest.mark.parametrize(
    ("embed_dim", "num_heads"),
    [(10, 3), (4, 8), (0, 1), (0, 0), (4, 0), (-4, 2), (4, -2)],
)
def test_heads_that_do_not_divide_the_features_are_refused(
    embed_dim, num_heads, refuses
):
    message = f"embed_dim={embed_dim} must be a positive multiple of "
    message += f"num_heads={num_heads}"
    with refuses(ValueError, message):
        MultiHeadAttention(embed_dim, num_heads)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("query", [(5, 8), (7, 8), (7, 8)]),
        ("query", [(), (7, 8), (7, 8)]),
        ("query", [(2, 3, 5, 8), (2, 7, 8), (2, 7, 8)]),
        ("query", [(2, 5, 7), (2, 7, 8), (2, 7, 8)]),
        ("key", [(2, 5, 8), (7, 8), (7, 8)]),
        ("key", [(2, 5, 8), (1, 7, 8), (2, 7, 8)]),
        ("key", [(1, 5, 8), (2, 7, 8), (2, 7, 8)]),
        ("key", [(2, 5, 8), (2, 7, 4), (2, 7, 8)]),
        ("value", [(2, 5, 8), (2, 7, 8), (1, 7, 8)]),
        ("value", [(2, 5, 8), (2, 7, 8), (2, 7, 4)]),
        ("value", [(2, 5, 8), (2, 7, 8), (2, 7, 8, 1)]),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, shapes, refuses):
    got = shapes[["query", "key", "value"].index(name)]
    message = f"{name} must be (B, length, 8) with the B of query, got {got}"
    ours, inputs = MultiHeadAttention(8, 2), [torch.zeros(shape) for shape in shapes]
    for call in (ours, ours.heads):
        with refuses(ValueError, message):
            call(*inputs)


@pytest.mark.parametrize("length", [1, 6])
def test_a_value_for_each_key_is_needed(length, refuses):
    q, k, v = torch.zeros(2, 5, 8), torch.zeros(2, 7, 8), torch.zeros(2, length, 8)
    with refuses(ValueError, f"value must be as long as key, 7, got {length}"):
        MultiHeadAttention(8, 2)(q, k, v)


@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 5, 7), (4, 5, 7), (1, 5, 7), (7,), (), (7, 5), (5, 6), (4, 7)],
        *[(2, 3, 5, 7), (3, 2, 5, 7), (4, 1, 5, 7), (2, 2, 5, 6), (1, 2, 2, 5, 7)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_that_do_not_fit_are_refused(shape, dtype, refuses):
    ours, q, k = MultiHeadAttention(8, 2), torch.zeros(2, 5, 8), torch.zeros(2, 7, 8)
    message = f"attn_mask must be 2-D or 4-D and broadcast to (2, 2, 5, 7), got {shape}"
    for call in (ours, ours.heads):
        with refuses(ValueError, message):
            call(q, k, attn_mask=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(1, 7), (5, 1), (1, 1), (1, 1, 5, 7), (2, 1, 1, 7), (1, 2, 5, 1)]
)
def test_masks_broadcast(shape, randomize):
    size = 2, 5, 7, 8, 2
    ours, _ = pair(size, randomize)
    inputs, mask = random_inputs(size), torch.rand(shape) < 0.6
    whole = mask.expand(2, 2, 5, 7)
    torch.testing.assert_close(
        ours(*inputs, attn_mask=mask), ours(*inputs, attn_mask=whole)
    )


def test_a_mask_and_is_causal_together_are_refused(refuses):
    ours, x = MultiHeadAttention(8, 2), torch.zeros(2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool)
    for call in (ours, ours.heads):
        with refuses(
            ValueError, "attn_mask must be None when is_causal=True, got both"
        ):
            call(x, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
def test_masks_that_are_neither_bool_nor_float_are_refused(dtype, refuses):
    ours, x = MultiHeadAttention(8, 2), torch.zeros(2, 5, 8)
    mask = torch.ones(5, 5, dtype=dtype)
    for call in (ours, ours.heads):
        with refuses(TypeError, f"attn_mask must be bool or float, got {dtype}"):
            call(x, attn_mask=mask)


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_float_mask_of_any_precision_is_added(dtype, mask_dtype, randomize):
    ours, _ = pair((2, 5, 5, 8, 2), randomize, dtype=dtype)
    x, mask = torch.randn(2, 5, 8, dtype=dtype), torch.randn(5, 5, dtype=mask_dtype)
    for call in (ours, ours.heads):
        found = call(x, attn_mask=mask)
        assert torch.equal(found, call(x, attn_mask=mask.to(dtype)))
        assert not torch.equal(found, call(x))


def test_torchs_order_of_arguments_is_refused():
    ours, x = MultiHeadAttention(8, 2), torch.zeros(2, 5, 8)
    for call in (ours, ours.heads):
        with pytest.raises(TypeError, match="positional argument"):
            call(x, x, x, None, True)


def test_results_are_contiguous(randomize):
    size = 2, 5, 7, 8, 2
    ours, _ = pair(size, randomize)
    inputs = random_inputs(size)
    for given in (inputs, [x.mT.contiguous().mT for x in inputs]):
        for mask in (None, torch.rand(5, 7) < 0.6):
            results = *ours(*given, mask, need_weights=True), ours.heads(*given, mask)
            assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("kind", MASKS)
def test_it_compiles_to_one_graph(kind, randomize, compiles):
    size = 3, 5, 7, 12, 4
    ours, _ = pair(size, randomize)
    chosen, _ = options(kind, size)

    def function(*inputs):
        heads = ours.heads(*inputs, **chosen)
        return *ours(*inputs, **chosen, need_weights=True), heads

    compiles(function, *random_inputs(size))
