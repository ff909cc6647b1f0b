"""Sinusoids against math.sin, rotations against complex numbers and Llama's."""

import math

import pytest
import torch
import torch.nn.functional as F

# Private, but the only way to be on a device that this machine lacks; and the one to
# see each operation that torch's notes on extending it name.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.attention.positional_encoding import rotary, sinusoidal_positions


def sinusoids_in_a_loop(positions, dim, base=10000.0):
    return torch.tensor(
        [
            [
                (math.cos if i % 2 else math.sin)(pos / base ** ((i - i % 2) / dim))
                for i in range(dim)
            ]
            for pos in positions
        ],
        dtype=torch.float64,
    )


def rotary_in_complex_numbers(x, positions, base=10000.0):
    frequencies = [base ** (-2 * i / x.shape[-1]) for i in range(x.shape[-1] // 2)]
    frequencies = torch.tensor(frequencies, dtype=torch.float64)
    angle = positions.double()[..., None] * frequencies
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.stack(x.double().chunk(2, dim=-1), dim=-1).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    return torch.cat(turned.unbind(-1), dim=-1)


@pytest.mark.parametrize("base", [10000.0, 500.0, 0.5])
@pytest.mark.parametrize("size", [(1, 2), (7, 6), (50, 64), (3, 10)])
def test_sinusoids_are_those_of_the_formula(size, base, agrees):
    expected = sinusoids_in_a_loop(range(size[0]), size[1], base).float()
    # Computed in float64, rounded once: the last of float32's 24 bits may differ.
    agrees(sinusoidal_positions(*size, base), expected, "math.sin, math.cos", 6e-8)


def test_base_is_ten_thousand_by_default():
    assert torch.equal(sinusoidal_positions(9, 8), sinusoidal_positions(9, 8, 10000.0))
    x = torch.randn(9, 8)
    assert torch.equal(rotary(x), rotary(x, base=10000.0))
    assert not torch.equal(rotary(x), rotary(x, base=10001.0))


def test_sinusoids_of_distant_positions_are_exact(agrees):
    last = [99_990, 99_999]
    expected = sinusoids_in_a_loop(last, 16).float()
    found = sinusoidal_positions(100_000, 16)[last]
    agrees(found, expected, "math.sin, math.cos", 6e-8)


def test_dot_product_of_two_sinusoids_depends_on_their_distance_only():
    table = sinusoidal_positions(60, 32).double()
    products = table @ table.T
    for distance in (0, 1, 7, 30):
        diagonal = products.diagonal(distance)
        # 32 products of numbers rounded to 6e-8
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), atol=2e-6, rtol=0
        )
    assert products[0, 0] > products[0, 1] > products[0, 2]


def test_every_sinusoid_has_the_same_length():
    lengths = sinusoidal_positions(60, 32).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((60,), 4.0), atol=1e-6, rtol=0)


def test_attention_without_positions_cannot_tell_the_order():
    x, order = torch.randn(5, 8, dtype=torch.float64), torch.randperm(5)

    def attention(x):
        return F.scaled_dot_product_attention(x, x, x)

    torch.testing.assert_close(attention(x)[order], attention(x[order]))
    table = sinusoidal_positions(5, 8).double()
    assert not torch.allclose(
        attention(x + table)[order], attention(x[order] + table), atol=1e-2
    )
    turned, shuffled = rotary(x[None])[0], rotary(x[order][None])[0]
    assert not torch.allclose(
        F.scaled_dot_product_attention(turned, turned, x)[order],
        F.scaled_dot_product_attention(shuffled, shuffled, x[order]),
        atol=1e-2,
    )


def test_no_positions_give_an_empty_table():
    table = sinusoidal_positions(0, 4)
    assert table.shape == (0, 4) and table.dtype == torch.float32


def test_sinusoids_are_made_on_the_default_device():
    assert sinusoidal_positions(3, 4).device.type == "cpu"
    with torch.device("meta"):
        table = sinusoidal_positions(3, 4)
    assert table.device.type == "meta" and table.shape == (3, 4)


def test_devices_without_float64_are_enough():
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.device.type != "cpu":
                assert made.dtype != torch.float64
            return made

    with NoFloat64(), torch.device("meta"):
        sinusoidal_positions(3, 4)
    # torch can imagine a tensor on a GPU of Apple's without having one.
    with FakeTensorMode(), NoFloat64():
        assert rotary(torch.empty(3, 4, device="mps")).device.type == "mps"


@pytest.mark.parametrize("base", [10000.0, 500.0, 0.5])
@pytest.mark.parametrize(
    "shape", [(6, 8), (1, 2), (2, 5, 4), (2, 3, 7, 10), (0, 3, 4), (2, 0, 4)]
)
def test_rotary_multiplies_by_complex_numbers(shape, base, agrees_with_gradients):
    x = torch.randn(shape, dtype=torch.float64)
    positions = torch.arange(shape[-2])
    for ours in (
        lambda x: rotary(x, base=base),
        lambda x: rotary(x, positions, base),
        lambda x: rotary(x, positions.double(), base),
    ):
        agrees_with_gradients(
            ours,
            lambda x: rotary_in_complex_numbers(x, positions, base),
            x,
            against="torch.view_as_complex",
            atol=1e-10,
        )


# 2**-24 and 2**-8 of the largest |x| (about 4), and in float32 one such rounding for
# each of cosine, product and sum.
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)]
)
def test_rotary_in_lower_precisions(dtype, atol, agrees_with_gradients):
    positions = torch.arange(10)
    agrees_with_gradients(
        rotary,
        lambda x: rotary_in_complex_numbers(x, positions).to(dtype),
        torch.randn(2, 3, 10, 16, dtype=dtype),
        against="torch.view_as_complex",
        atol=atol,
    )


def test_bfloat16_tells_neighbours_apart_at_any_distance():
    x = torch.randn(1, 8, dtype=torch.bfloat16).expand(4, 8)
    positions = torch.arange(1000, 1004)
    expected = rotary_in_complex_numbers(x, positions)
    # Angles in bfloat16 would be the same for all four.
    torch.testing.assert_close(
        rotary(x, positions).double(), expected, atol=1.6e-2, rtol=0
    )


@pytest.mark.parametrize("size", [(7,), (2, 1, 7), (1, 3, 7), (1, 1, 7), (2, 3, 7)])
def test_positions_broadcast_over_the_heads(size):
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    positions = torch.randint(0, 100, size)
    expected = rotary_in_complex_numbers(x, positions.expand(x.shape[:-1]))
    torch.testing.assert_close(rotary(x, positions), expected, atol=1e-10, rtol=0)


def test_position_zero_changes_nothing():
    x = torch.randn(5, 8)
    assert torch.equal(rotary(x, torch.zeros(5)), x)
    assert torch.equal(rotary(x)[0], x[0])


def test_rotary_keeps_lengths():
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(
        rotary(x).norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=0
    )


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 20, 8)
    scores = rotary(q) @ rotary(k).T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), atol=1e-12, rtol=0
        )
    here, far = torch.arange(20), torch.arange(1000, 1020)
    torch.testing.assert_close(
        rotary(q, here) @ rotary(k, here).T,
        rotary(q, far) @ rotary(k, far).T,
        atol=1e-10,
        rtol=0,
    )
    assert scores[0, 0] != scores[0, 1]


def test_two_turns_add_up():
    x = torch.randn(5, 8, dtype=torch.float64)
    twice = rotary(rotary(x, torch.full((5,), 3)), torch.full((5,), 4))
    torch.testing.assert_close(twice, rotary(x, torch.full((5,), 7)))


def test_rotary_takes_non_contiguous_inputs_and_leaves_them_alone():
    x = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    positions = torch.arange(10)[::2]
    copies = x.clone(), positions.clone()
    assert not x.is_contiguous() and not positions.is_contiguous()
    torch.testing.assert_close(
        rotary(x, positions), rotary(x.contiguous(), positions.contiguous())
    )
    assert torch.equal(x, copies[0]) and torch.equal(positions, copies[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_keeps_dtype_and_device(dtype):
    x = torch.randn(2, 5, 8, dtype=dtype)
    assert rotary(x).dtype == dtype
    assert rotary(x.to("meta")).device.type == "meta"
    with torch.device("meta"):
        assert rotary(x).device.type == "cpu"


def test_float64_angles_are_float64():
    x = torch.randn(1, 8, dtype=torch.float64)
    position = torch.tensor([99_999])
    expected = rotary_in_complex_numbers(x, position)
    torch.testing.assert_close(rotary(x, position), expected, atol=1e-9, rtol=0)


def test_sinusoids_are_those_of_xlm(reference_library, agrees):
    xlm = reference_library("transformers.models.xlm.modeling_xlm")
    expected = xlm.create_sinusoidal_embeddings(50, 32, torch.empty(50, 32))
    agrees(sinusoidal_positions(50, 32), expected, "transformers (XLM)", atol=6e-8)


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
# Both compute angles up to 100 in float32, off by up to 4e-6, for |x| up to about 4. In
# bfloat16 Llama rounds the cosines before it multiplies, and then the products.
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 3e-5), (torch.bfloat16, 6e-2)]
)
def test_rotations_are_those_of_llama(
    dtype, atol, base, reference_library, agrees_with_gradients
):
    llama = reference_library("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    positions = torch.randint(0, 100, (2, 10))

    def theirs(q, k):
        cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
        return llama.apply_rotary_pos_emb(q, k, cos, sin)

    agrees_with_gradients(
        lambda q, k: tuple(rotary(x, positions[:, None], base) for x in (q, k)),
        theirs,
        *torch.randn(2, 2, 4, 10, 16, dtype=dtype),
        against="transformers (Llama)",
        atol=atol,
    )


def test_a_negative_number_of_positions_is_refused(refuses):
    with refuses(ValueError, "num_positions must be at least 0, got -1"):
        sinusoidal_positions(-1, 4)


@pytest.mark.parametrize("dim", [-2, 0, 1, 3, 7])
def test_an_odd_dim_is_refused(dim, refuses):
    with refuses(ValueError, f"dim must be even and at least 2, got {dim}"):
        sinusoidal_positions(5, dim)


@pytest.mark.parametrize("base", [0, -1.0, math.nan])
def test_a_base_that_is_not_positive_is_refused(base, refuses):
    message = f"base must be positive, got {base}"
    with refuses(ValueError, message):
        sinusoidal_positions(5, 4, base)
    with refuses(ValueError, message):
        rotary(torch.zeros(5, 4), base=base)


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (3, 1), (3, 0), (2, 3, 7)])
def test_rotary_refuses_an_odd_number_of_features(shape, refuses):
    with refuses(ValueError, f"x must be (..., T, d_k) with d_k even, got {shape}"):
        rotary(torch.zeros(shape))


def test_rotary_refuses_integers(refuses):
    with refuses(TypeError, "x must have a float dtype, got torch.int64"):
        rotary(torch.ones(3, 4, dtype=torch.int64))


# For x of shape (3, 3, 5, 4): (3, 5) might be the positions of a batch or of the heads.
@pytest.mark.parametrize(
    "shape",
    [
        *[(6,), (1,), (), (3, 5), (1, 5), (5, 5), (1, 3, 3, 5), (5, 3, 3)],
        *[(2, 3, 5), (3, 2, 5), (3, 3, 4), (3, 3, 1)],
    ],
)
def test_positions_that_do_not_fit_are_refused(shape, refuses):
    message = "positions must be (5,), or (3, 3, 5) with 1 for any size but the last, "
    with refuses(ValueError, message + f"got {shape}"):
        rotary(torch.zeros(3, 3, 5, 4), torch.zeros(shape))


def test_a_mask_is_no_positions(refuses):
    with refuses(TypeError, "positions must be numbers, got torch.bool"):
        rotary(torch.zeros(5, 4), torch.ones(5, dtype=torch.bool))


# Around 2**24 float32 has steps of 1: the angle itself would be off by up to 0.5.
@pytest.mark.parametrize("position", [131_072, 10_000_000, 2**24 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotary_at_distant_positions_is_exact(position, dtype, agrees):
    x, positions = torch.randn(3, 64, dtype=dtype), position + torch.arange(3)
    expected = rotary_in_complex_numbers(x, positions).to(dtype)
    # As near. float64 keeps 53 bits of an angle of 2**24: 29 after the point, 2e-9.
    atol = 1e-6 if dtype == torch.float32 else 2e-8
    agrees(rotary(x, positions), expected, "torch.view_as_complex", atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_angles_is_float64(dtype):
    class SmallFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                assert made.numel() <= 5 * 4
            return made

    x = torch.randn(2, 3, 5, 8, dtype=dtype)
    with SmallFloat64():
        rotary(x)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, low):
    x, table = torch.randn(2, 5, 8, dtype=dtype), sinusoidal_positions(5, 8)
    turned = rotary(x)
    with torch.autocast("cpu", low):
        assert torch.equal(rotary(x), turned)
        assert torch.equal(sinusoidal_positions(5, 8), table)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_results_are_contiguous(order, dtype):
    assert sinusoidal_positions(5, 8).is_contiguous()
    places = [order.index(i) for i in range(4)]
    size = [(2, 3, 5, 8)[i] for i in order]
    assert rotary(torch.randn(size, dtype=dtype).permute(places)).is_contiguous()


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda: sinusoidal_positions(5, 8), []),
        (lambda x: x + sinusoidal_positions(*x.shape), [torch.ones(5, 8)]),
        (rotary, [torch.ones(2, 3, 5, 8)]),
        (rotary, [torch.ones(2, 3, 5, 8), torch.arange(10).view(2, 1, 5)]),
    ],
)
def test_it_compiles_to_one_graph(function, inputs, compiles):
    compiles(function, tuple(inputs))
