"""Scaled dot-product attention against torch's, and what attention is known for."""

import math

import pytest
import torch
import torch.nn.functional as F

# Private, but the only way to be on a device that this machine lacks; and the one to
# see each operation that torch's notes on extending it name.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.attention.dot_product import scaled_dot_product_attention

TORCH = "F.scaled_dot_product_attention"

# The leading dimensions, L, S, d_k and d_v
SHAPES = [
    ((2, 3), 4, 4, 8, 8),
    ((2, 3), 5, 7, 8, 6),
    ((2, 3), 7, 5, 8, 6),
    ((4,), 3, 6, 5, 2),
    ((), 3, 6, 5, 2),
    ((1, 2, 3), 2, 3, 4, 5),
    ((1, 1), 1, 6, 3, 4),
    ((2, 1), 6, 1, 3, 4),
    ((1, 1), 1, 1, 1, 1),
    ((0, 2), 3, 4, 5, 6),
    ((2, 0), 3, 4, 5, 6),
    ((2, 2), 0, 4, 5, 6),
]


def random_inputs(shape, dtype=torch.float64):
    batch, L, S, d_k, d_v = shape
    sizes = (*batch, L, d_k), (*batch, S, d_k), (*batch, S, d_v)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def options(kind, shape, dtype=torch.float64):
    batch, L, S, _, _ = shape
    return {
        "plain": lambda: {},
        "scaled": lambda: {"scale": 0.3},
        "causal": lambda: {"is_causal": True},
        "bool": lambda: {"attn_mask": torch.rand(L, S) < 0.6},
        "bool of every head": lambda: {"attn_mask": torch.rand(*batch, L, S) < 0.6},
        "padding": lambda: {"attn_mask": torch.rand(*batch, 1, S) < 0.6},
        "float": lambda: {"attn_mask": torch.randn(L, S, dtype=dtype)},
        "float, scaled": lambda: {
            "attn_mask": torch.randn(*batch, L, S, dtype=dtype),
            "scale": 2.0,
        },
    }[kind]()


KINDS = [
    "plain",
    "scaled",
    "causal",
    "bool",
    "bool of every head",
    "padding",
    "float",
    "float, scaled",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(shape, kind, agrees_with_gradients):
    chosen = options(kind, shape)
    agrees_with_gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, **chosen),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **chosen),
        *random_inputs(shape),
        against=TORCH,
        atol=1e-10,
    )


# Sums of some ten products of order 1 to 10. float32 keeps 24 bits of each (6e-8),
# bfloat16 8 (4e-3), and on which of the steps in between it rounds is up to the kernel
# that torch chooses.
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.float32, 2e-5, 1e-5), (torch.bfloat16, 3e-2, 3e-2)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precisions_are_as_exact_as_they_can_be(
    kind, dtype, atol, rtol, agrees_with_gradients
):
    shape = ((2, 3), 5, 7, 8, 6)
    chosen = options(kind, shape, dtype)
    agrees_with_gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, **chosen),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **chosen),
        *random_inputs(shape, dtype),
        against=TORCH,
        atol=atol,
        rtol=rtol,
    )


def test_bfloat16_loses_nothing_but_the_rounding_of_the_output():
    # Scores around 100: rounded to bfloat16 they would be off by up to 0.25 each.
    q, k, v = random_inputs(((4,), 16, 32, 64, 8), torch.bfloat16)
    ours = scaled_dot_product_attention(4 * q, 4 * k, v)
    exact = scaled_dot_product_attention(4 * q.double(), 4 * k.double(), v.double())
    # Half a unit in the last of 8 bits, and a little for the float32 in between
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-4)


def test_two_keys_by_hand():
    query = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    key = torch.tensor([[1.0, 2.0], [2.0, -1.0]], dtype=torch.float64)
    value = torch.tensor([[10.0], [20.0]], dtype=torch.float64)
    first, second = (math.exp(score / math.sqrt(2)) for score in (11, 2))
    expected = (10 * first + 20 * second) / (first + second)
    assert scaled_dot_product_attention(query, key, value).item() == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_output_is_made_of(kind):
    shape = ((2, 3), 5, 7, 8, 6)
    q, k, v = random_inputs(shape)
    chosen = options(kind, shape)
    output, weights = scaled_dot_product_attention(
        q, k, v, return_weights=True, **chosen
    )
    assert weights.shape == (2, 3, 5, 7)
    torch.testing.assert_close(weights @ v, output, atol=1e-12, rtol=0)
    assert torch.equal(output, scaled_dot_product_attention(q, k, v, **chosen))


def test_weights_are_positive_and_sum_to_one():
    q, k, v = random_inputs(((2, 3), 5, 7, 8, 6))
    _, weights = scaled_dot_product_attention(q, k, v, return_weights=True)
    assert (weights > 0).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(2, 3, 5).double(), atol=1e-12, rtol=0
    )


def test_output_lies_between_the_smallest_and_the_largest_value():
    q, k, v = random_inputs(((2, 3), 5, 7, 8, 6))
    output = scaled_dot_product_attention(q, k, v)
    assert (output >= v.amin(-2, keepdim=True)).all()
    assert (output <= v.amax(-2, keepdim=True)).all()


def test_future_tokens_do_not_change_the_past():
    q, k, v = random_inputs(((2,), 6, 6, 8, 4))
    before = scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, 4:], v[:, 4:] = torch.randn(2, 2, 8), torch.randn(2, 2, 4)
    after = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).any()


def test_a_single_causal_query_sees_the_first_key_only():
    q, k, v = random_inputs(((2,), 1, 6, 8, 4))
    output = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(output, v[:, :1])


def test_order_of_keys_does_not_matter_and_order_of_queries_is_kept():
    q, k, v = random_inputs(((2,), 5, 7, 8, 4))
    output = scaled_dot_product_attention(q, k, v)
    keys, queries = torch.randperm(7), torch.randperm(5)
    shuffled = scaled_dot_product_attention(q[:, queries], k[:, keys], v[:, keys])
    torch.testing.assert_close(shuffled, output[:, queries], atol=1e-12, rtol=0)


def test_equal_keys_share_the_weight_equally():
    q, k, v = random_inputs(((), 3, 4, 8, 2))
    output = scaled_dot_product_attention(q, k[:1].expand(4, 8), v)
    torch.testing.assert_close(output, v.mean(0).expand(3, 2), atol=1e-12, rtol=0)


def test_scale_zero_gives_the_mean_and_a_large_scale_the_best_match():
    q, k, v = random_inputs(((), 3, 4, 8, 2))
    mean = scaled_dot_product_attention(q, k, v, scale=0)
    torch.testing.assert_close(mean, v.mean(0).expand(3, 2), atol=1e-12, rtol=0)
    best = scaled_dot_product_attention(q, k, v, scale=1e6)
    assert torch.equal(best, v[(q @ k.T).argmax(-1)])


def test_one_key_gets_all_the_attention_however_low_its_score():
    q, k, v = random_inputs(((2,), 3, 1, 8, 4))
    output = scaled_dot_product_attention(q, -1e6 * q[:, :1] + k, v)
    assert torch.equal(output, v.expand(2, 3, 4))


def test_huge_scores_do_not_overflow():
    q, k, v = random_inputs(((2,), 3, 5, 8, 4), torch.float32)
    output = scaled_dot_product_attention(1e4 * q, 1e4 * k, v)
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [bool, float])
def test_a_query_that_may_attend_to_nothing_gets_zeros_and_finite_gradients(
    kind, dtype, agrees_with_gradients
):
    allowed = torch.rand(3, 7) < 0.6
    allowed[:, 0] = True
    allowed[1] = False
    mask = allowed if kind is bool else torch.zeros(3, 7, dtype=dtype)
    if kind is float:
        mask[~allowed] = -torch.inf
    q, k, v = random_inputs(((2,), 3, 7, 8, 4), dtype)
    for x in (q, k, v):
        x.requires_grad_()
    output, weights = scaled_dot_product_attention(q, k, v, mask, return_weights=True)
    assert (output[:, 1] == 0).all() and (weights[:, 1] == 0).all()
    assert (output[:, [0, 2]] != 0).all()
    (output.sum() + weights.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, 1] == 0).all()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    agrees_with_gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        q,
        k,
        v,
        against=TORCH,
        atol=tolerance,
        rtol=tolerance,
    )


def test_without_any_key_the_output_is_zero():
    q, k, v = (x.requires_grad_() for x in random_inputs(((2,), 3, 0, 8, 4)))
    output, weights = scaled_dot_product_attention(q, k, v, return_weights=True)
    assert torch.equal(output, torch.zeros(2, 3, 4, dtype=torch.float64))
    assert weights.shape == (2, 3, 0)
    output.sum().backward()
    assert (q.grad == 0).all()


def test_a_nan_is_not_hidden():
    q, k, v = random_inputs(((), 2, 3, 4, 5))
    q[0, 0] = torch.nan
    output = scaled_dot_product_attention(q, k, v)
    assert output[0].isnan().all() and output[1].isfinite().all()


def test_non_contiguous_inputs_work(agrees):
    q = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    k = torch.randn(2, 14, 8, dtype=torch.float64)[:, ::2]
    v = torch.randn(2, 1, 4, dtype=torch.float64).expand(2, 7, 4)
    mask = (torch.rand(7, 5) < 0.6).T
    assert not any(x.is_contiguous() for x in (q, k, v, mask))
    ours, weights = scaled_dot_product_attention(q, k, v, mask, return_weights=True)
    assert ours.is_contiguous() and weights.is_contiguous()
    agrees(ours, F.scaled_dot_product_attention(q, k, v, mask), TORCH, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_inputs_are_not_modified(dtype):
    inputs = *random_inputs(((2,), 3, 5, 8, 4)), torch.rand(3, 5).round().to(dtype)
    copies = [x.clone() for x in inputs]
    scaled_dot_product_attention(*inputs)
    assert all(map(torch.equal, inputs, copies))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_have_the_dtype_of_the_inputs_whatever_that_of_the_mask(
    dtype, mask_dtype
):
    q, k, v = random_inputs(((2,), 3, 5, 8, 4), dtype)
    mask = torch.randn(3, 5, dtype=mask_dtype)
    results = scaled_dot_product_attention(q, k, v, mask, return_weights=True)
    assert {x.dtype for x in results} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_device_follows_the_inputs(kind):
    shape = ((2,), 3, 5, 8, 4)
    chosen = options(kind, shape)
    if "attn_mask" in chosen:
        chosen["attn_mask"] = chosen["attn_mask"].to("meta")
    q, k, v = (x.to("meta") for x in random_inputs(shape))
    output = scaled_dot_product_attention(q, k, v, **chosen)
    assert output.device.type == "meta" and output.shape == (2, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, low, kind):
    shape = ((2, 3), 5, 7, 8, 6)
    inputs, chosen = random_inputs(shape, dtype), options(kind, shape, dtype)
    exact = scaled_dot_product_attention(*inputs, **chosen, return_weights=True)
    with torch.autocast("cpu", low):
        found = scaled_dot_product_attention(*inputs, **chosen, return_weights=True)
    assert all(map(torch.equal, found, exact))


def test_autocast_rounds_no_scores_and_lets_none_overflow():
    x = torch.full((1, 2, 64), 40.0)
    x[:, 1] *= -1  # scores of 64 * 40 * 40 / 8, above and below
    query = torch.ones(1, 1)
    key = torch.tensor([[240.0], [240.375]])
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(scaled_dot_product_attention(x, x, x), x)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = scaled_dot_product_attention(query, key, key, return_weights=True)
    # Both scores are 240 in bfloat16. exp(-0.375) = 0.687
    torch.testing.assert_close(
        weights, torch.tensor([[0.4073, 0.5927]]), atol=1e-4, rtol=0
    )


def test_autocast_of_another_device_rounds_nothing_either():
    class NoFloat16(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert getattr(made, "dtype", None) != torch.float16
            return made

    # torch can imagine a tensor on a GPU of Apple's without having one.
    with FakeTensorMode(), torch.autocast("mps", torch.float16):
        x = torch.empty(2, 3, 4, device="mps")
        assert (x @ x.mT).dtype == torch.float16
        with NoFloat16():
            scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_to_one_graph(kind, compiles):
    shape = ((2, 3), 5, 7, 8, 6)
    chosen = options(kind, shape)

    def function(q, k, v):
        return scaled_dot_product_attention(q, k, v, **chosen, return_weights=True)

    compiles(function, tuple(random_inputs(shape)))


SHAPES_FIT = (
    "query, key and value must be (..., L, d_k), (..., S, d_k) and (..., S, d_v) with "
    "d_k > 0 and equal leading dimensions, got "
)


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(3, 8), (5, 7), (5, 4)], id="another d_k"),
        pytest.param([(3, 8), (5, 8), (6, 4)], id="another S"),
        pytest.param([(2, 3, 8), (1, 5, 8), (1, 5, 4)], id="one batch for two"),
        pytest.param([(1, 3, 8), (2, 5, 8), (2, 5, 4)], id="two batches for one"),
        pytest.param([(2, 3, 8), (2, 5, 8), (1, 5, 4)], id="one batch of values"),
        pytest.param([(2, 3, 8), (2, 5, 8), (5, 4)], id="no batch of values"),
        pytest.param([(3, 8), (2, 5, 8), (2, 5, 4)], id="no batch of queries"),
        pytest.param([(3, 0), (5, 0), (5, 4)], id="d_k is 0"),
        pytest.param([(2, 3, 0), (2, 5, 0), (2, 5, 4)], id="d_k is 0 in a batch"),
        pytest.param([(8,), (5, 8), (5, 4)], id="1-D query"),
        pytest.param([(8,), (8,), (4,)], id="all 1-D"),
        pytest.param([(3, 8), (5, 8), (5,)], id="1-D value"),
        pytest.param([(8,), (8,), (3, 4)], id="2-D value only"),
        pytest.param([(), (), ()], id="scalars"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, refuses):
    message = SHAPES_FIT + f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
    with refuses(ValueError, message):
        scaled_dot_product_attention(*map(torch.zeros, shapes))


def test_one_feature_is_enough():
    ones = torch.ones(2, 1)
    assert torch.equal(scaled_dot_product_attention(ones, ones, ones), ones)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [
        *[(3, 4, 5), (1, 4, 5), (2, 1, 1, 4, 5), (5,), (1,), ()],  # not two, not all
        *[(4, 6), (3, 5), (5, 4), (2, 3, 5, 4), (3, 3, 4, 5), (2, 2, 4, 5)],
    ],
)
def test_masks_that_do_not_fit_the_scores_are_refused(shape, dtype, refuses):
    q, k, v = random_inputs(((2, 3), 4, 5, 8, 2))
    message = "attn_mask must have two or all of the dimensions (2, 3, 4, 5), each of "
    message += f"that size or 1, got {shape}"
    with refuses(ValueError, message):
        scaled_dot_product_attention(q, k, v, torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 4, 5), (5,), (4, 6)])
def test_masks_of_a_single_sequence_are_two_dimensional(shape, refuses):
    q, k, v = random_inputs(((), 4, 5, 8, 2))
    message = "attn_mask must have two or all of the dimensions (4, 5), each of "
    message += f"that size or 1, got {shape}"
    with refuses(ValueError, message):
        scaled_dot_product_attention(q, k, v, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (4, 1), (1, 1)])
def test_masks_broadcast_to_the_scores(shape, batch):
    q, k, v = random_inputs((batch, 4, 5, 8, 2))
    mask = torch.rand(shape) < 0.6
    whole = mask.expand(*batch, 4, 5).clone()
    for given in (mask, mask[(None,) * len(batch)], whole):
        found = scaled_dot_product_attention(q, k, v, given)
        assert torch.equal(found, scaled_dot_product_attention(q, k, v, whole))


def test_padded_keys_are_as_good_as_no_keys():
    q, k, v = random_inputs(((2, 3), 4, 5, 8, 2))
    valid = torch.arange(5) < torch.tensor([[5], [3]])  # (B, S)
    output = scaled_dot_product_attention(q, k, v, valid[:, None, None])
    short = scaled_dot_product_attention(q[1], k[1, :, :3], v[1, :, :3])
    torch.testing.assert_close(output[1], short, atol=1e-12, rtol=0)


def test_a_row_masked_with_the_lowest_number_attends_evenly():
    q, k, v = random_inputs(((2,), 4, 5, 8, 2), torch.float32)
    mask = torch.full((4, 5), torch.finfo(torch.float32).min)
    output = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(output, v.mean(1, keepdim=True).expand(2, 4, 2))


def test_a_mask_and_is_causal_together_are_refused(refuses):
    q, k, v = random_inputs(((), 4, 4, 8, 2))
    message = "attn_mask must be None when is_causal=True, got both"
    with refuses(ValueError, message):
        scaled_dot_product_attention(
            q, k, v, torch.ones(4, 4, dtype=torch.bool), is_causal=True
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
def test_masks_that_are_neither_bool_nor_float_are_refused(dtype, refuses):
    q, k, v = random_inputs(((), 4, 5, 8, 2))
    with refuses(TypeError, f"attn_mask must be bool or float, got {dtype}"):
        scaled_dot_product_attention(q, k, v, torch.ones(4, 5, dtype=dtype))


def test_what_torch_calls_dropout_is_not_taken_for_a_mask_option():
    q, k, v = random_inputs(((), 4, 4, 8, 2))
    with pytest.raises(TypeError, match="positional arguments but 6 were given"):
        scaled_dot_product_attention(q, k, v, None, 0.0, True)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.int64, torch.int64, torch.int64),
    ],
    ids=str,
)
def test_mixed_and_integer_dtypes_are_refused(dtypes, refuses):
    message = f"query, key and value must share a float dtype, got {dtypes}"
    with refuses(TypeError, message):
        scaled_dot_product_attention(*(torch.ones(2, 2, dtype=d) for d in dtypes))
