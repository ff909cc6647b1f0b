"""Chunk by chunk against the whole, in memory and from a file."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.kv_cache.chunking import MemoryMappedKV, chunked_attention, iter_chunks

ROOT = Path(__file__).resolve().parents[2]
TORCH = "F.scaled_dot_product_attention"
# The leading dimensions, L, S, d_k and d_v
SHAPES = [
    ((2, 3), 5, 7, 8, 6),
    ((4,), 3, 20, 5, 2),
    ((), 3, 20, 5, 2),
    ((1, 2, 3), 2, 3, 4, 5),
    ((1, 1), 1, 64, 16, 16),
    ((2, 1), 6, 1, 3, 4),
    ((1,), 1, 1, 1, 1),
    ((0, 2), 3, 4, 5, 6),
    ((2, 2), 0, 4, 5, 6),
    ((2,), 3, 4, 5, 0),
]


def random_inputs(shape, dtype=torch.float64):
    batch, L, S, d_k, d_v = shape
    sizes = (*batch, L, d_k), (*batch, S, d_k), (*batch, S, d_v)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def in_chunks(size, scale=None):
    return lambda q, k, v: chunked_attention(q, iter_chunks(k, v, size), scale)


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside it and still alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    @property
    def now(self):
        self.storages = {r: n for r, n in self.storages.items() if not r.expired()}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            StorageWeakRef(x.untyped_storage()) for x in args if torch.is_tensor(x)
        }
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                storage = x.untyped_storage()
                if StorageWeakRef(storage) not in given:
                    self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("size", [1, 2, 3, 7, 19, 20, 21, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_attention_over_the_whole(
    shape, size, agrees_with_gradients
):
    agrees_with_gradients(
        in_chunks(size),
        F.scaled_dot_product_attention,
        *random_inputs(shape),
        against=TORCH,
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, -1.0])
def test_the_scale_is_that_of_torch(scale, agrees_with_gradients):
    agrees_with_gradients(
        in_chunks(3, scale),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale),
        *random_inputs(((2, 3), 5, 7, 8, 6)),
        against=TORCH,
        atol=1e-12,
    )


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_it_is_the_attention_of_transformers(size, reference_library, agrees):
    llama = reference_library("transformers.models.llama.modeling_llama")
    q, k, v = random_inputs(((2, 3), 5, 20, 8, 8))
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    theirs, _ = llama.eager_attention_forward(module, q, k, v, None, 8**-0.5)
    # Their softmax is in float32.
    agrees(
        chunked_attention(q, iter_chunks(k, v, size)),
        theirs.transpose(1, 2),
        "transformers, eager_attention_forward",
        atol=1e-6,
    )


@pytest.mark.parametrize("how", ["rising", "falling", "flat", "up and down"])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_it_does_not_matter_where_the_largest_score_is(
    how, size, agrees_with_gradients
):
    steps = torch.arange(10, dtype=torch.float64)
    scores = {
        "rising": steps,
        "falling": -steps,
        "flat": 0 * steps,
        "up and down": (steps * 7) % 10,
    }[how]
    q, _, v = random_inputs(((2,), 4, 10, 1, 3))
    agrees_with_gradients(
        in_chunks(size, 1.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
        q.abs() + 1,
        (100 * scores[:, None]).expand(2, 10, 1),
        v,
        against=TORCH,
        atol=1e-12,
    )


def test_the_order_of_the_chunks_does_not_matter(agrees):
    q, k, v = random_inputs(((2, 3), 4, 20, 8, 6))
    chunks = list(iter_chunks(k, v, 3))
    whole = F.scaled_dot_product_attention(q, k, v)
    for _ in range(10):
        shuffled = [chunks[n] for n in torch.randperm(len(chunks))]
        agrees(chunked_attention(q, shuffled), whole, TORCH, atol=1e-12)


def test_chunks_of_different_sizes_fit_together(agrees):
    q, k, v = random_inputs(((2,), 4, 20, 8, 6))
    sizes = [1, 7, 2, 10]
    chunks = zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    whole = F.scaled_dot_product_attention(q, k, v)
    agrees(chunked_attention(q, chunks), whole, TORCH, atol=1e-12)


def test_two_chunks_by_hand():
    q = torch.tensor([[2.0]], dtype=torch.float64)
    k = torch.tensor([[1.0], [3.0], [2.0]], dtype=torch.float64)
    v = torch.tensor([[10.0], [20.0], [30.0]], dtype=torch.float64)
    e = math.exp
    expected = (10 * e(2) + 20 * e(6) + 30 * e(4)) / (e(2) + e(6) + e(4))
    found = chunked_attention(q, [(k[:1], v[:1]), (k[1:], v[1:])])
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [1, 4, 5, 10, 11])
def test_chunks_are_views_in_order_and_the_last_has_what_is_left(size):
    k, v = torch.randn(2, 10, 4), torch.randn(2, 10, 3)
    chunks = list(iter_chunks(k, v, size))
    assert len(chunks) == math.ceil(10 / size)
    assert {keys.shape[1] for keys, _ in chunks[:-1]} <= {size}
    for part, whole in zip(zip(*chunks, strict=True), (k, v), strict=True):
        assert torch.equal(torch.cat(part, 1), whole)
        assert all(
            x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            for x in part
        )


def test_no_rows_are_no_chunks():
    assert list(iter_chunks(torch.randn(0, 4), torch.randn(0, 3), 2)) == []


def test_chunks_are_gone_through_once():
    q, k, v = random_inputs(((), 2, 9, 4, 4))
    asked = []

    def once():
        for n, chunk in enumerate(iter_chunks(k, v, 2)):
            asked.append(n)
            yield chunk

    chunks = once()
    chunked_attention(q, chunks)
    assert asked == [0, 1, 2, 3, 4]
    assert next(chunks, None) is None


def test_one_chunk_is_alive_while_the_next_is_made():
    q = torch.randn(2, 8)
    k, v = torch.randn(2, 1000, 8)
    before_next, whole = [], []

    with torch.no_grad(), Live() as live:

        def fresh():
            for keys, values in iter_chunks(k, v, 50):
                before_next.append(live.now)
                yield keys.clone(), values.clone()

        chunked_attention(q, fresh())
    chunk = 2 * 50 * 8 * 4
    # Between two chunks only what is carried along: the query, maximum, sum, output.
    carried = (2 * 8 + 2 * 2 * 8 + 8 * 2) * 4
    assert max(before_next) <= carried
    # And at most the chunk, and scores and weights: (L, C) three times at a time.
    assert live.most <= chunk + 4 * 2 * 50 * 4 + carried
    with torch.no_grad(), Live() as live:
        chunked_attention(q, [(k.clone(), v.clone())])
    whole = 2 * 1000 * 8 * 4
    assert live.most > whole  # the meter measures


def test_the_mode_counts_what_is_alive():
    with Live() as live:
        a = torch.zeros(100)
        b = a[:50]
        assert live.now == 400
        del a
        assert live.now == 400  # the view keeps it
        del b
        assert live.now == 0 and live.most == 400


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_half_precision_loses_nothing_but_the_rounding_of_the_output(size, low):
    q, k, v = random_inputs(((4,), 16, 100, 64, 8), low)
    q, k = 4 * q, 4 * k  # scores around 100: rounded to bfloat16 they'd be off by 0.25
    ours = chunked_attention(q, iter_chunks(k, v, size))
    assert ours.dtype == low
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    unit = torch.finfo(low).eps / 2
    torch.testing.assert_close(ours.double(), exact, rtol=unit, atol=1e-4)


def test_a_long_sum_of_half_precision_does_not_stop_growing():
    # In float16 one more than 2048 is 2048; the sum is kept in float32.
    ones = torch.ones(5000, 1, dtype=torch.float16)
    values = torch.linspace(0, 1, 5000, dtype=torch.float16)[:, None]
    found = chunked_attention(ones[:1], iter_chunks(ones, values, 1))
    assert found.item() == pytest.approx(0.5, abs=1e-3)


def test_float32_is_as_exact_as_it_can_be(agrees_with_gradients):
    agrees_with_gradients(
        in_chunks(3),
        F.scaled_dot_product_attention,
        *random_inputs(((2, 3), 5, 70, 8, 6), torch.float32),
        against=TORCH,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, low):
    q, k, v = random_inputs(((2, 3), 5, 7, 8, 6), dtype)
    exact = chunked_attention(q, iter_chunks(k, v, 3))
    with torch.autocast("cpu", low):
        found = chunked_attention(q, iter_chunks(k, v, 3))
    assert torch.equal(found, exact)


def test_autocast_of_another_device_rounds_nothing_either():
    class NoFloat16(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert getattr(made, "dtype", None) != torch.float16
            return made

    # torch can imagine a tensor on a GPU of Apple's without having one.
    with FakeTensorMode(), torch.autocast("mps", torch.float16):
        x = torch.empty(3, 4, device="mps")
        assert (x @ x.mT).dtype == torch.float16
        with NoFloat16():
            chunked_attention(x, [(x, x)])


def hidden(scores, v):
    """The attention of one query with these scores, -inf for a hidden key."""
    weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    return weights @ v


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "scores",
    [
        [-math.inf, -math.inf, -math.inf, 1.0, 2.0, 0.0],
        [1.0, 2.0, 0.0, -math.inf, -math.inf, -math.inf],
        [-math.inf, 3.0, -math.inf, -math.inf, -1e300, -math.inf],
        [-math.inf, -math.inf, -2.0, -math.inf, -math.inf, -3.0],
    ],
    ids=str,
)
def test_keys_that_score_minus_infinity_take_no_part(scores, size):
    v = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    keys = torch.tensor(scores, dtype=torch.float64)[:, None].requires_grad_()
    found = chunked_attention(one, iter_chunks(keys, v, size))
    expected = hidden(scores, v)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)
    upstream = torch.randn(3, dtype=torch.float64)
    grads = torch.autograd.grad(found[0], (keys, v), upstream)
    (expected,) = torch.autograd.grad(expected, v, upstream)
    torch.testing.assert_close(grads[1], expected, atol=1e-12, rtol=0)
    assert grads[0].isfinite().all()
    assert (grads[0][keys == -math.inf] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_where_all_keys_are_hidden_the_output_is_zero(size):
    keys, v = torch.full((5, 1), -torch.inf), torch.randn(5, 3, requires_grad=True)
    found = chunked_attention(torch.ones(2, 1), iter_chunks(keys, v, size))
    assert torch.equal(found, torch.zeros(2, 3))
    (grad,) = torch.autograd.grad(found.sum(), v)
    assert torch.equal(grad, torch.zeros(5, 3))


def test_nan_is_not_hidden():
    q, k, v = random_inputs(((), 2, 6, 4, 3))
    q[0, 0] = math.nan
    found = chunked_attention(q, iter_chunks(k, v, 2))
    assert found[0].isnan().all() and found[1].isfinite().all()
    k[0] = math.nan  # in the first chunk, which others follow
    assert chunked_attention(q, iter_chunks(k, v, 2)).isnan().all()


def test_inputs_are_not_modified_and_need_not_be_contiguous(agrees):
    q = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    k = torch.randn(2, 14, 8, dtype=torch.float64)[:, ::2]
    v = torch.randn(2, 1, 4, dtype=torch.float64).expand(2, 7, 4)
    copies = [x.clone() for x in (q, k, v)]
    found = chunked_attention(q, iter_chunks(k, v, 3))
    agrees(found, F.scaled_dot_product_attention(q, k, v), TORCH, atol=1e-12)
    assert all(map(torch.equal, (q, k, v), copies))


def test_device_follows_the_query():
    q, k, v = (x.to("meta") for x in random_inputs(((2,), 3, 7, 4, 5)))
    out = chunked_attention(q, iter_chunks(k, v, 3))
    assert out.is_meta and out.shape == (2, 3, 5)


def test_it_compiles_to_one_graph(compiles):
    compiles(in_chunks(3), tuple(random_inputs(((2,), 5, 7, 8, 6))))


def test_no_chunks_are_refused(refuses):
    for none in ([], iter(()), iter_chunks(torch.ones(0, 4), torch.ones(0, 4), 3)):
        with refuses(ValueError, "chunks must hold a chunk at least, got none"):
            chunked_attention(torch.ones(2, 4), none)


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(3, 8), (5, 7), (5, 4)], id="another d_k"),
        pytest.param([(3, 8), (5, 8), (6, 4)], id="another C"),
        pytest.param([(2, 3, 8), (1, 5, 8), (1, 5, 4)], id="one batch for two"),
        pytest.param([(1, 3, 8), (2, 5, 8), (2, 5, 4)], id="two batches for one"),
        pytest.param([(2, 3, 8), (2, 5, 8), (1, 5, 4)], id="one batch of values"),
        pytest.param([(2, 3, 8), (2, 5, 8), (5, 4)], id="no batch of values"),
        pytest.param([(3, 8), (2, 5, 8), (2, 5, 4)], id="no batch of queries"),
        pytest.param([(3, 0), (5, 0), (5, 4)], id="d_k is 0"),
        pytest.param([(2, 3, 0), (2, 5, 0), (2, 5, 4)], id="d_k is 0 in a batch"),
        pytest.param([(3, 8), (0, 8), (0, 4)], id="C is 0"),
        pytest.param([(8,), (5, 8), (5, 4)], id="1-D query"),
        pytest.param([(3, 8), (8,), ()], id="1-D key"),
        pytest.param([(8,), (8,), ()], id="all 1-D"),
        pytest.param([(3, 8), (5, 8), (5,)], id="1-D value"),
        pytest.param([(3, 8), (5, 8), ()], id="0-D value"),
        pytest.param([(), (), ()], id="scalars"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, refuses):
    q, k, v = map(torch.zeros, shapes)
    message = "shapes must be (..., L, d_k), (..., C, d_k) and (..., C, d_v) "
    message += f"with d_k, C > 0 and one d_v, got {shapes[0]}, {shapes[1]}, {shapes[2]}"
    with refuses(ValueError, message):
        chunked_attention(q, [(k, v)])


@pytest.mark.parametrize(
    "second", [[(4, 8), (4, 5)], [(4, 7), (4, 6)], [(4, 8), (3, 6)]]
)
def test_a_later_chunk_that_does_not_fit_the_first_is_refused(second, refuses):
    chunks = [(torch.ones(4, 8), torch.ones(4, 6)), tuple(map(torch.ones, second))]
    message = "shapes must be (..., L, d_k), (..., C, d_k) and (..., C, d_v) "
    message += f"with d_k, C > 0 and one d_v, got (2, 8), {second[0]}, {second[1]}"
    with refuses(ValueError, message):
        chunked_attention(torch.ones(2, 8), chunks)


def test_one_feature_one_key_and_one_value_are_enough():
    one = torch.ones(1, 1)
    assert torch.equal(chunked_attention(one, [(one, one)]), one)


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
    q, k, v = (torch.ones(2, 2, dtype=dtype) for dtype in dtypes)
    message = f"query, keys, values must share a float dtype, got {dtypes}"
    with refuses(TypeError, message):
        chunked_attention(q, [(k, v)])


@pytest.mark.parametrize("size", [0, -1, math.nan])
def test_chunks_below_one_row_are_refused_before_any_is_asked_for(size, refuses):
    with refuses(ValueError, f"chunk_size must be at least 1, got {size}"):
        iter_chunks(torch.ones(4, 2), torch.ones(4, 2), size)


@pytest.mark.parametrize(
    ("k", "v"), [((4, 2), (5, 2)), ((1, 4, 2), (2, 4, 2)), ((4, 2), (1, 4, 2)),
                 ((4,), (4,)), ((), ())],
)  # fmt: skip
def test_keys_and_values_that_do_not_fit_each_other_are_refused(k, v, refuses):
    message = "keys and values must be (..., S, d_k) and (..., S, d_v), got "
    with refuses(ValueError, message + f"{k} and {v}"):
        iter_chunks(torch.ones(k), torch.ones(v), 2)


# --- the file ------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.bin"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_attention_over_a_file_is_attention_over_the_whole(path, size, dtype):
    k, v = torch.randn(2, 10, 4, dtype=dtype)
    cache = MemoryMappedKV(path, length=10, dim=4, dtype=dtype)
    cache.write(6, k[6:], v[6:])
    cache.write(0, k[:6], v[:6])
    q = torch.randn(2, 4, dtype=dtype)
    found = chunked_attention(q, cache.chunks(size))
    assert torch.equal(found, chunked_attention(q, iter_chunks(k, v, size)))
    chunks = list(cache.chunks(size))
    assert len(chunks) == math.ceil(10 / size)
    assert torch.equal(torch.cat([keys for keys, _ in chunks]), k)
    assert torch.equal(torch.cat([values for _, values in chunks]), v)


def test_the_file_has_the_bytes_of_keys_and_values_and_no_more(path):
    cache = MemoryMappedKV(path, 10_000, 64)
    assert path.stat().st_size == 2 * 10_000 * 64 * 4
    k, v = torch.randn(2, 3, 64)
    cache.write(9_997, k, v)
    assert path.stat().st_size == 2 * 10_000 * 64 * 4
    both = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    both = both.view(2, 10_000, 64)
    assert torch.equal(both[:, 9_997:], torch.stack([k, v]))
    assert not both[:, :9_997].any()
    MemoryMappedKV(str(path) + "16", 10, 4, torch.bfloat16)
    assert Path(str(path) + "16").stat().st_size == 2 * 10 * 4 * 2


def test_another_cache_on_the_same_file_goes_on_with_what_is_there(path):
    k, v = torch.randn(2, 5, 3)
    first = MemoryMappedKV(path, 5, 3)
    first.write(0, k, v)
    second = MemoryMappedKV(path, 5, 3)
    (chunk,) = second.chunks(5)
    assert all(map(torch.equal, chunk, (k, v)))
    second.write(4, v[:1], k[:1])
    keys, values = list(first.chunks(1))[4]
    assert torch.equal(keys, v[:1]) and torch.equal(values, k[:1])


def test_chunks_are_copies(path):
    cache = MemoryMappedKV(path, 4, 2)
    cache.write(0, torch.ones(4, 2), torch.ones(4, 2))
    for keys, values in cache.chunks(2):
        keys.zero_()
        values.zero_()
    assert all(x.all() for chunk in cache.chunks(2) for x in chunk)


def test_rows_that_are_not_written_are_left_out_with_stop(path, agrees):
    cache = MemoryMappedKV(path, 100, 4)
    k, v = torch.randn(2, 7, 4)
    cache.write(0, k, v)
    q = torch.randn(1, 4)
    exact = F.scaled_dot_product_attention(q, k, v)
    agrees(chunked_attention(q, cache.chunks(3, stop=7)), exact, TORCH, atol=1e-6)
    assert [len(keys) for keys, _ in cache.chunks(3, stop=7)] == [3, 3, 1]
    assert [len(keys) for keys, _ in cache.chunks(60)] == [60, 40]
    # Without it the zeros take part: 93 keys that score 0.
    everything = chunked_attention(q, cache.chunks(3))
    assert (everything - exact).abs().max() > 0.1
    assert [len(values) for _, values in cache.chunks(9, 100)] == [9] * 11 + [1]


def test_one_row_and_one_column_are_enough(path):
    cache = MemoryMappedKV(path, 1, 1)
    cache.write(0, torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    assert chunked_attention(torch.ones(1, 1), cache.chunks(1, stop=1)).item() == 3


def test_what_is_written_needs_no_gradient_and_keeps_none(path):
    cache = MemoryMappedKV(path, 2, 2)
    k, v = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    cache.write(0, k, v)
    for keys, values in cache.chunks(2):
        assert not keys.requires_grad and not values.requires_grad


def test_nothing_may_be_written(path):
    cache = MemoryMappedKV(path, 2, 2)
    for start in range(3):
        cache.write(start, torch.ones(0, 2), torch.ones(0, 2))
    assert not any(x.any() for chunk in cache.chunks(2) for x in chunk)


def test_one_tenth_of_the_bytes_is_alive_at_a_time(path):
    cache = MemoryMappedKV(path, 10_000, 64)
    for start in range(0, 10_000, 1000):
        cache.write(start, *torch.randn(2, 1000, 64))
    q = torch.randn(1, 64)
    peaks = {}
    for size in (10_000, 1000):
        with torch.no_grad(), Live() as live:
            chunked_attention(q, cache.chunks(size))
        peaks[size] = live.most
    both = 2 * 10_000 * 64 * 4
    assert both <= peaks[10_000] < 1.05 * both
    assert both / 10 <= peaks[1000] < 1.05 * both / 10


LIMITED = """
import resource, sys
import torch

from snippets.kv_cache.chunking import MemoryMappedKV, chunked_attention

torch.set_num_threads(1)
path, length = sys.argv[1], int(sys.argv[2])
cache = MemoryMappedKV(path, length, 64)
q = torch.ones(1, 64)
chunked_attention(q, cache.chunks(1000, stop=1000))  # loads what has to be loaded
pages = int(open("/proc/self/statm").read().split()[5])
limit = pages * resource.getpagesize() + length * 64 * 4  # half of the file
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(chunked_attention(q, cache.chunks(1000)).sum().item())
try:
    list(cache.chunks(length))
except RuntimeError as error:
    print("allocate memory" in str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_a_process_attends_over_a_file_that_does_not_fit_its_memory(path):
    length = 200_000  # 102 MB
    cache = MemoryMappedKV(path, length, 64)
    cache.write(length - 1, torch.zeros(1, 64), torch.full((1, 64), float(length)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(length)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    total, refused = done.stdout.split()
    assert float(total) == pytest.approx(64, rel=1e-3)  # the mean of the values, each 1
    assert refused == "True"


@pytest.mark.parametrize(("length", "dim"), [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_sizes_below_one_are_refused(length, dim, path, refuses):
    message = f"length, dim must be at least 1, got {length}, {dim}"
    with refuses(ValueError, message):
        MemoryMappedKV(path, length, dim)
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 159, 161, 320])
def test_a_file_of_another_size_is_refused_and_left_alone(size, path, refuses):
    path.write_bytes(b"x" * size)
    with refuses(ValueError, f"path must hold 160 bytes, got {size}"):
        MemoryMappedKV(path, 5, 4)
    assert path.read_bytes() == b"x" * size


@pytest.mark.parametrize(
    ("start", "k", "v"),
    [
        *[(-1, (1, 4), (1, 4)), (5, (1, 4), (1, 4)), (3, (3, 4), (3, 4))],
        *[(0, (6, 4), (6, 4)), (6, (0, 4), (0, 4)), (0, (2, 3), (2, 3))],
        *[(0, (2, 4), (1, 4)), (0, (2, 4), (2, 3)), (0, (4,), (4,)), (0, (), ())],
        *[(0, (1, 2, 4), (1, 2, 4)), (0, (2, 4), (4,)), (math.nan, (2, 4), (2, 4))],
    ],
    ids=str,
)
def test_writes_that_do_not_fit_are_refused_and_write_nothing(
    start, k, v, path, refuses
):
    cache = MemoryMappedKV(path, 5, 4)
    message = f"keys and values must be (n, 4) in rows 0 to 5, got {k} and {v} at row "
    with refuses(ValueError, message + f"{start}"):
        cache.write(start, torch.ones(k), torch.ones(v))
    assert not any(x.any() for chunk in cache.chunks(5) for x in chunk)


@pytest.mark.parametrize(
    ("k", "v"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_writes_of_another_dtype_are_refused_instead_of_rounded(k, v, path, refuses):
    cache = MemoryMappedKV(path, 5, 4)
    with refuses(TypeError, f"dtypes must be torch.float32, got {(k, v)}"):
        cache.write(0, torch.ones(2, 4, dtype=k), torch.ones(2, 4, dtype=v))
    assert not any(x.any() for chunk in cache.chunks(5) for x in chunk)


@pytest.mark.parametrize("stop", [0, -1, 6, math.nan])
def test_a_stop_outside_the_rows_is_refused(stop, path, refuses):
    cache = MemoryMappedKV(path, 5, 4)
    with refuses(ValueError, f"stop must be from 1 to 5, got {stop}"):
        cache.chunks(2, stop)
    with refuses(ValueError, "chunk_size must be at least 1, got 0"):
        cache.chunks(0)
