"""Quantization against torch's fake quantization, and how far off it may be."""

import itertools
import math

import pytest
import torch

from snippets.kv_cache.quantization import (
    dequantize,
    pack_int4,
    quantize_affine,
    quantize_symmetric,
    storage_bytes,
    unpack_int4,
)

BITS = range(2, 9)
every_bits = pytest.mark.parametrize("bits", BITS)
both = pytest.mark.parametrize("quantize", [quantize_symmetric, quantize_affine])
# x is (2, 3, 16, 8): what shares a scale
DIMS = [None, -1, -2, 0, (-1, -2), (0, 2), (0, 1, 2, 3)]
every_float = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
every_dim = pytest.mark.parametrize("dim", DIMS, ids=str)

PER_TENSOR = "torch.fake_quantize_per_tensor_affine"
PER_CHANNEL = "torch.fake_quantize_per_channel_affine"


def keys(dtype=torch.float32):
    """Of channels that differ in size and do not center on 0."""
    x = torch.randn(2, 3, 16, 8) * torch.logspace(-2, 1, 8) + torch.randn(8)
    return x.to(dtype)


def grid(quantize, bits):
    """The smallest and the largest code."""
    n = 2 ** (bits - 1) - 1
    return (-n, n) if quantize is quantize_symmetric else (0, 2**bits - 1)


def exact_parameters(quantize, x, bits, dim):
    """Scale, and zero point before rounding, in float64."""
    dims = tuple(range(x.dim())) if dim is None else dim
    x, (first, last) = x.double(), grid(quantize, bits)
    if quantize is quantize_symmetric:
        scale = x.abs().amax(dims, keepdim=True) / last
        return scale, None
    zero = torch.zeros((), dtype=torch.float64)
    low, high = x.amin(dims, True).minimum(zero), x.amax(dims, True).maximum(zero)
    scale = (high - low) / (last - first)
    return scale, first - low / scale


@both
@every_bits
def test_per_tensor_values_are_those_of_torch(bits, quantize, agrees):
    x = keys()
    q, scale, *zero_point = quantize(x, bits)
    zero = zero_point[0].item() if zero_point else 0
    reference = torch.fake_quantize_per_tensor_affine(
        x, scale.item(), zero, *grid(quantize, bits)
    )
    # torch multiplies by 1 / scale: the same but for the last bit of the product.
    agrees(dequantize(q, scale, zero), reference, PER_TENSOR, atol=1e-5)


@both
@every_bits
@pytest.mark.parametrize("axis", range(4))
def test_per_channel_values_are_those_of_torch(axis, bits, quantize, agrees):
    x = keys()
    others = tuple(d for d in range(4) if d != axis)
    q, scale, *zero_point = quantize(x, bits, others)
    zero = zero_point[0] if zero_point else torch.zeros_like(scale, dtype=torch.int32)
    reference = torch.fake_quantize_per_channel_affine(
        x, scale.flatten(), zero.flatten(), axis, *grid(quantize, bits)
    )
    agrees(dequantize(q, scale, *zero_point), reference, PER_CHANNEL, atol=1e-5)


@both
@every_dim
@every_float
def test_scales_and_zero_points_are_those_of_float64(dtype, dim, quantize, agrees):
    x = keys(dtype)
    for bits in BITS:
        _, scale, *zero_point = quantize(x, bits, dim)
        expected, unrounded = exact_parameters(quantize, x, bits, dim)
        against = "their definition in float64"
        agrees(scale, expected.float(), against, atol=0, rtol=1e-6)
        for found in zero_point:
            assert found.shape == scale.shape
            # Halfway between two numbers either is right.
            assert ((found - unrounded).abs() <= 0.5 + 1e-4).all()


@both
@every_dim
@every_float
def test_the_error_is_half_a_scale_at_most_and_nearly_reached(dtype, dim, quantize):
    x = keys(dtype)
    for bits in BITS:
        q, scale, *zero_point = quantize(x, bits, dim)
        error = (dequantize(q, scale, *zero_point).double() - x.double()).abs() / scale
        # A code of 8 bits, computed in float32, is uncertain by 256 * 2^-24.
        assert 0.3 < error.max() <= 0.5 + 256 * 2**-23


@both
@every_bits
def test_codes_reach_both_ends_of_their_range_and_never_leave_it(bits, quantize):
    x = torch.cat((keys().flatten(), torch.tensor([-40.0, 30.0])))
    if quantize is quantize_symmetric:
        x = torch.cat((x, torch.tensor([40.0])))
    q, *_ = quantize(x, bits)
    assert (q.amin().item(), q.amax().item()) == grid(quantize, bits)


@both
@every_bits
def test_ends_halfway_between_two_codes_stay_in_the_range(bits, quantize):
    first, last = grid(quantize, bits)
    for start in range(last - first):
        # A grid of step 1 whose zero would lie between two codes
        x = torch.tensor([-start - 0.5, last - first - start - 0.5])
        q, scale, *zero_point = quantize(x, bits)
        assert (q >= first).all() and (q <= last).all()
        error = (dequantize(q, scale, *zero_point) - x).abs()
        assert (error <= scale / 2 * (1 + 1e-5)).all()


@both
@every_dim
def test_more_bits_are_more_exact(dim, quantize):
    x = keys()
    errors = []
    for bits in BITS:
        q, *rest = quantize(x, bits, dim)
        errors.append((dequantize(q, *rest) - x).square().sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


@both
@every_dim
def test_a_group_is_quantized_as_if_it_were_alone(dim, quantize):
    x = keys()
    q, scale, *zero_point = quantize(x, 4, dim)
    dims = range(4) if dim is None else [dim] if isinstance(dim, int) else dim
    shared = {d % 4 for d in dims}
    assert scale.shape == tuple(1 if d in shared else n for d, n in enumerate(x.shape))
    assert all(z.shape == scale.shape for z in zero_point)
    for place in itertools.product(*map(range, scale.shape)):
        group = tuple(slice(None) if d in shared else i for d, i in enumerate(place))
        alone = quantize(x[group], 4)
        assert torch.equal(q[group], alone[0])
        for found, expected in zip([scale, *zero_point], alone[1:], strict=True):
            assert found[place] == expected.flatten()


def test_the_dtypes_are_what_they_are_called():
    x = keys()
    assert [t.dtype for t in quantize_symmetric(x)] == [torch.int8, torch.float32]
    dtypes = [torch.uint8, torch.float32, torch.int32]
    assert [t.dtype for t in quantize_affine(x)] == dtypes
    assert dequantize(*quantize_affine(x)).dtype == torch.float32


def test_eight_bits_and_one_scale_are_the_defaults():
    x = keys()
    for quantize in (quantize_symmetric, quantize_affine):
        for found, expected in zip(quantize(x), quantize(x, 8, None), strict=True):
            assert torch.equal(found, expected)


def test_three_values_by_hand():
    x = torch.tensor([-1.0, 0.5, 0.2])
    q, scale = quantize_symmetric(x, 3)  # codes -3 to 3
    assert q.tolist() == [-3, 2, 1]  # 0.5 / (1 / 3) = 1.5, and half goes to even
    assert scale.tolist() == pytest.approx([1 / 3])
    q, scale, zero_point = quantize_affine(x, 2)  # codes 0 to 3, over -1 to 0.5
    assert (q.tolist(), scale.tolist(), zero_point.tolist()) == ([0, 3, 2], [0.5], [2])
    assert dequantize(q, scale, zero_point).tolist() == [-1, 0.5, 0]


@both
@every_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_channel_of_zeros_comes_back_as_zeros(dtype, bits, quantize):
    x = keys(dtype)
    x[..., 3] = 0
    q, scale, *zero_point = quantize(x, bits, (0, 1, 2))
    assert (scale > 0).all() and scale.isfinite().all()
    assert (q[..., 3] == 0).all() and all((z[..., 3] == 0).all() for z in zero_point)
    assert (dequantize(q, scale, *zero_point)[..., 3] == 0).all()
    alone = torch.zeros(2, 3, 16, 1, dtype=dtype)
    assert (dequantize(*quantize(alone, bits)) == 0).all()


@both
@every_bits
@pytest.mark.parametrize("value", [-7.3, 1e-30, 2.5e30])
def test_a_constant_channel_comes_back_as_it_was(value, bits, quantize):
    x = torch.full((5, 4), value)
    q, *rest = quantize(x, bits, 0)
    torch.testing.assert_close(dequantize(q, *rest), x, rtol=1e-6, atol=0)


@both
@every_bits
def test_zero_stays_exactly_zero(bits, quantize):
    x = torch.randn(1000).abs() + 3  # far from 0, all on one side
    for sign in (1, -1):
        x[17] = 0
        q, *rest = quantize(sign * x, bits)
        assert dequantize(q, *rest)[17] == 0


def test_the_range_of_the_affine_grid_includes_zero():
    for value, zero_point in ((6.0, 0), (-6.0, 15)):
        x = torch.tensor([value, 2 * value])
        _, scale, found = quantize_affine(x, 4)
        assert found.item() == zero_point and scale.item() == pytest.approx(12 / 15)


@both
@every_bits
def test_the_smallest_and_largest_floats_do_not_break_it(bits, quantize):
    for value in (1.8e38, 1e-38, 1e-45):
        x = torch.tensor([-value, value, value / 3])
        q, scale, *zero_point = quantize(x, bits)
        back = dequantize(q, scale, *zero_point)
        assert 0 < scale.item() < math.inf
        # In float64: of subnormal numbers float32 has too few to halve them.
        assert ((back.double() - x).abs() <= scale.double() * 0.50001).all()


@both
@every_bits
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(value, bits, quantize):
    x = keys()
    x[0, 1, 5, 2] = value
    q, scale, *zero_point = quantize(x, bits, -1)
    assert (q[0, 1, 5] == 0).all() and all(z[0, 1, 5] == 0 for z in zero_point)
    back = dequantize(q, scale, *zero_point)
    assert back[0, 1, 5].isnan().all()
    assert back.isnan().sum() == 8
    x[0, 1, 5] = 0
    q_of_others, *rest = quantize(x, bits, -1)
    others = torch.ones(2, 3, 16, dtype=torch.bool)
    others[0, 1, 5] = False
    assert torch.equal(back[others], dequantize(q_of_others, *rest)[others])


def test_what_float32_cannot_hold_counts_as_infinite():
    for quantize in (quantize_symmetric, quantize_affine):
        x = torch.tensor([1e300, 1.0], dtype=torch.float64)
        assert dequantize(*quantize(x)).isnan().all()


@both
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_single_value_is_exact(shape, quantize):
    for value in (-3.7, 0.0, 0.1):
        x = torch.full(shape, value)
        q, *rest = quantize(x, 2)
        assert q.shape == rest[0].shape == shape
        torch.testing.assert_close(dequantize(q, *rest), x, rtol=1e-6, atol=0)


@both
def test_a_cache_without_tokens_has_no_codes_and_no_scales(quantize):
    q, scale, *zero_point = quantize(torch.zeros(2, 3, 0, 8), 4, -1)
    assert q.shape == (2, 3, 0, 8)
    assert all(t.shape == (2, 3, 0, 1) for t in (scale, *zero_point))
    assert dequantize(q, scale, *zero_point).shape == (2, 3, 0, 8)
    assert unpack_int4(pack_int4(q.to(torch.int8))).shape == (2, 3, 0, 8)
    assert storage_bytes((2, 3, 0, 8), 4, -1) == 0


@both
def test_equal_values_have_equal_codes_and_order_is_kept(quantize):
    x = keys().flatten()
    x[100:200] = x[:100]
    q, *_ = quantize(x, 3)
    assert torch.equal(q[100:200], q[:100])
    assert (q[x.argsort()].int().diff() >= 0).all()


def test_the_symmetric_grid_treats_both_signs_alike():
    x = keys()
    (q, scale), (of_opposite, same) = (quantize_symmetric(s * x, 4) for s in (1, -1))
    assert torch.equal(of_opposite, -q) and torch.equal(scale, same)


@both
def test_non_contiguous_inputs_work_and_results_are_contiguous(quantize):
    x = keys()
    for given in (x.mT, x[:, :, ::2], x[..., :1].expand(-1, -1, -1, 8)):
        assert not given.is_contiguous()
        results = quantize(given, 4, -1)
        expected = quantize(given.clone(memory_format=torch.contiguous_format), 4, -1)
        for found, same in zip(results, expected, strict=True):
            assert found.is_contiguous() and torch.equal(found, same)
    packed = pack_int4(quantize_symmetric(x.mT, 4)[0].mT)
    assert packed.is_contiguous() and unpack_int4(packed.mT).is_contiguous()


@both
def test_inputs_are_not_modified(quantize):
    x = keys()
    copy = x.clone()
    q, *rest = quantize(x, 4, -1)
    copies = [t.clone() for t in (q, *rest)]
    dequantize(q, *rest)
    assert torch.equal(x, copy) and all(map(torch.equal, (q, *rest), copies))


@both
def test_no_gradient_flows_through_the_rounding(quantize):
    x = keys().requires_grad_()
    assert not any(t.requires_grad for t in quantize(x, 4))


def test_dequantizing_has_the_gradient_of_a_product(agrees_with_gradients):
    q, scale, zero_point = quantize_affine(keys(torch.float64), 4, -2)
    agrees_with_gradients(
        lambda s: dequantize(q, s, zero_point),
        lambda s: s * q.double() - s * zero_point.double(),
        scale.double(),
        against="scale * q - scale * zero_point",
        atol=1e-12,
    )


@both
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, low, quantize):
    x = keys(dtype)
    exact = quantize(x, 4, -1)
    with torch.autocast("cpu", low):
        found = quantize(x, 4, -1)
        back = dequantize(*found)
    assert all(map(torch.equal, found, exact))
    assert torch.equal(back, dequantize(*exact)) and back.dtype == torch.float32


@both
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_half_inputs_are_quantized_as_their_values_in_float32(low, quantize):
    x = keys(low)
    assert all(map(torch.equal, quantize(x, 8, -1), quantize(x.float(), 8, -1)))


@both
def test_device_follows_the_input(quantize):
    results = quantize(keys().to("meta"), 4, -1)
    back = dequantize(*results)
    assert {t.device.type for t in (*results, back)} == {"meta"}
    assert unpack_int4(torch.zeros(3, 4, device="meta").to(torch.uint8)).is_meta


@both
def test_it_compiles_to_one_graph(quantize, compiles):
    def function(x):
        q, *rest = quantize(x, 4, -1)
        return q, *rest, dequantize(q, *rest)

    compiles(function, (keys(),), (keys()[:, :, :5],))


def test_unpacking_compiles_to_one_graph(compiles):
    packed = torch.randint(256, (3, 16)).to(torch.uint8)
    compiles(unpack_int4, (packed,), (packed[:2],))


def test_all_pairs_of_codes_are_packed_in_a_byte_and_found_again():
    pairs = torch.tensor([*itertools.product(range(-8, 8), repeat=2)])
    packed = pack_int4(pairs.to(torch.int8))
    assert packed.shape == (256, 1) and packed.dtype == torch.uint8
    assert packed.unique().numel() == 256
    # In numbers: 16 for each step of the second, the first modulo 16
    assert torch.equal(packed[:, 0].long(), pairs[:, 0] % 16 + 16 * (pairs[:, 1] % 16))
    back = unpack_int4(packed)
    assert back.dtype == torch.int8 and torch.equal(back.long(), pairs)


def test_packing_halves_the_last_dimension_and_keeps_the_others():
    q = torch.randint(-8, 8, (2, 3, 5, 10)).to(torch.int8)
    packed = pack_int4(q)
    assert packed.shape == (2, 3, 5, 5) and packed.nbytes * 2 == q.nbytes
    assert torch.equal(unpack_int4(packed), q)
    assert torch.equal(pack_int4(q[1, 2]), packed[1, 2])


def test_the_matrix_of_the_notes_takes_what_is_counted():
    x = torch.randn(1000, 128)
    assert x.nbytes == 512_000
    q, scale = quantize_symmetric(x, 8, dim=1)
    assert q.nbytes == 128_000 and scale.nbytes == 4_000
    assert storage_bytes(x.shape, 8, dim=1) == q.nbytes + scale.nbytes
    q, scale = quantize_symmetric(x, 4, dim=0)
    assert pack_int4(q).nbytes == 64_000 and scale.nbytes == 512
    assert storage_bytes(x.shape, 4, dim=0) == pack_int4(q).nbytes + scale.nbytes


@every_dim
def test_bytes_counted_are_bytes_held(dim):
    x = keys()
    q, scale = quantize_symmetric(x, 8, dim)
    assert storage_bytes(x.shape, 8, dim) == q.nbytes + scale.nbytes
    tensors = quantize_affine(x, 8, dim)
    held = sum(t.nbytes for t in tensors)
    assert storage_bytes(tuple(x.shape), 8, dim, affine=True) == held


@every_bits
def test_codes_are_counted_in_whole_bytes(bits):
    assert [storage_bytes((n,), bits) - 4 for n in (1, 7, 8, 16)] == [
        1,
        math.ceil(7 * bits / 8),
        bits,
        2 * bits,
    ]


def test_the_expected_error_of_normal_numbers():
    # Uniform rounding has the variance scale^2 / 12 (Bennett, 1948).
    x = torch.randn(1000, 128, dtype=torch.float64)
    for bits, most in ((8, 0.01), (4, 0.15)):
        q, scale = quantize_symmetric(x, bits, dim=1)
        error = (dequantize(q, scale) - x).square().mean()
        expected = scale.double().square().mean() / 12
        assert error.item() == pytest.approx(expected.item(), rel=0.02)
        assert error.sqrt() < most


def outliers():
    """Keys of which every token has the same three large channels."""
    x = torch.randn(64, 32)
    x[:, :3] *= 20
    return x


def relative_error(x, bits, dim):
    return ((dequantize(*quantize_affine(x, bits, dim)) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("seed", range(5))
def test_where_channels_differ_a_scale_per_channel_is_the_better_one(seed):
    torch.manual_seed(seed)
    x = outliers()
    q_channel, q_token = (dequantize(*quantize_affine(x, 4, d)) for d in (0, 1))
    small = x[:, 3:]
    per_channel, per_token = (
        ((q[:, 3:] - small).norm() / small.norm()) for q in (q_channel, q_token)
    )
    assert per_channel < 0.15 and per_token > 0.5
    # And the other way round, where tokens differ
    assert relative_error(x.T, 4, 1) == pytest.approx(relative_error(x, 4, 0), rel=1e-6)


@both
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 2.5, "4", None])
def test_bits_other_than_two_to_eight_are_refused(bits, quantize, refuses):
    message = f"bits must be a whole number from 2 to 8, got {bits}"
    with refuses(ValueError, message):
        quantize(keys(), bits)
    with refuses(ValueError, message):
        storage_bytes((2, 3), bits)


@both
@pytest.mark.parametrize("dim", [2, -3, (0, 2), (), 0.5])
def test_dimensions_that_x_lacks_are_refused(dim, quantize, refuses):
    message = f"dim must name dimensions of (3, 4), got {dim}"
    error = TypeError if dim == 0.5 else ValueError
    with pytest.raises(error) if dim == 0.5 else refuses(error, message):
        quantize(torch.ones(3, 4), 4, dim)
    with pytest.raises(error) if dim == 0.5 else refuses(error, message):
        storage_bytes((3, 4), 4, dim)


@both
@pytest.mark.parametrize("dim", [None, 0, -2, (0, 1)])
def test_a_group_of_nothing_is_refused(dim, quantize, refuses):
    message = f"dim must span a value at least, got {dim} of (0, 4)"
    with refuses(ValueError, message):
        quantize(torch.ones(0, 4), 4, dim)
    with refuses(ValueError, message):
        storage_bytes((0, 4), 4, dim)


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_not_float_is_refused(dtype, quantize, refuses):
    with refuses(TypeError, f"x must be float, got {dtype}"):
        quantize(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_codes_that_are_no_integers_are_refused(dtype, refuses):
    with refuses(TypeError, f"q must be an integer tensor, got {dtype}"):
        dequantize(torch.ones(3, dtype=dtype), torch.ones(1))


@pytest.mark.parametrize(
    "shape", [(), (4,), (1, 3, 4), (3, 2), (2, 4), (4, 3), (2, 1), (1, 3)]
)
def test_scales_and_zero_points_that_do_not_fit_are_refused(shape, refuses):
    q = torch.ones(3, 4, dtype=torch.int8)
    message = "scale and zero_point must be (3, 4), with 1 where shared, got "
    with refuses(ValueError, message + str(shape)):
        dequantize(q, torch.ones(shape))
    with refuses(ValueError, message + str(shape)):
        dequantize(q, torch.ones(1, 1), torch.ones(shape, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1), (1, 1)])
def test_scales_that_fit_are_spread_over_their_groups(shape):
    q = torch.arange(12, dtype=torch.uint8).view(3, 4)
    scale, zero_point = torch.rand(shape), torch.randint(16, shape)
    found = dequantize(q, scale, zero_point)
    for i, j in itertools.product(range(3), range(4)):
        place = i % shape[0], j % shape[1]
        code = q[i, j].item() - zero_point[place].item()
        assert found[i, j].item() == pytest.approx(scale[place].item() * code)


def test_codes_below_the_zero_point_become_negative():
    q = torch.tensor([3], dtype=torch.uint8)
    assert dequantize(q, torch.tensor([2.0]), 5).item() == -4
    assert dequantize(q, torch.tensor([2.0]), torch.tensor([5]).int()).item() == -4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_only_int8_is_packed(dtype, refuses):
    with refuses(TypeError, f"q must be int8, got {dtype}"):
        pack_int4(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_an_odd_number_of_codes_is_not_packed(shape, refuses):
    with refuses(ValueError, f"q must be (..., D) with an even D, got {shape}"):
        pack_int4(torch.ones(shape, dtype=torch.int8))


@pytest.mark.parametrize("code", [-128, -9, 8, 127])
def test_codes_that_need_more_than_four_bits_are_not_packed(code, refuses):
    q = torch.tensor([[7, -8], [0, code]], dtype=torch.int8)
    with refuses(ValueError, f"q must hold codes from -8 to 7, got {code}"):
        pack_int4(q)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_only_bytes_are_unpacked(dtype, refuses):
    with refuses(TypeError, f"packed must be uint8, got {dtype}"):
        unpack_int4(torch.ones(2, dtype=dtype))
