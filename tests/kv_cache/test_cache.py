"""The cache against transformers' DynamicCache and plain concatenation."""

import pytest
import torch

from snippets.kv_cache.cache import KVCache, kv_cache_bytes

# B, H and d_k, then how many tokens each update brings
SHAPES = [
    ((2, 3, 4), (5, 1, 1, 2)),
    ((1, 1, 1), (1,)),
    ((3, 2, 8), (1, 1, 1, 1)),
    ((2, 1, 4), (0, 3, 0)),
    ((0, 2, 4), (3, 1)),
]
every_shape = pytest.mark.parametrize(("shape", "chunks"), SHAPES, ids=str)
both_kinds = pytest.mark.parametrize("max_length", [None, 9])


def tokens(shape, T, dtype=torch.float64):
    """Keys and values of T tokens."""
    B, H, d_k = shape
    return torch.randn(2, B, H, T, d_k, dtype=dtype).unbind()


def filled(max_length, shape=(2, 3, 4), T=5, dtype=torch.float64):
    cache = KVCache(max_length)
    return cache, *cache.update(*tokens(shape, T, dtype))


@both_kinds
@every_shape
def test_it_returns_and_keeps_all_tokens_so_far(shape, chunks, max_length):
    cache = KVCache(max_length)
    key, value = tokens(shape, sum(chunks))
    seen = 0
    for T in chunks:
        new = slice(seen, seen + T)
        found = cache.update(key[:, :, new], value[:, :, new])
        seen += T
        assert len(cache) == seen
        assert torch.equal(found[0], key[:, :, :seen])
        assert torch.equal(found[1], value[:, :, :seen])
        assert torch.equal(cache.keys, found[0])
        assert torch.equal(cache.values, found[1])


@both_kinds
@pytest.mark.parametrize(("shape", "chunks"), SHAPES[:-1], ids=str)
def test_it_agrees_with_the_cache_of_transformers(
    shape, chunks, max_length, agrees, reference_library
):
    ours, theirs = KVCache(max_length), reference_library("transformers").DynamicCache()
    for T in chunks:
        new = tokens(shape, T)
        for x, y in zip(ours.update(*new), theirs.update(*new, 0), strict=True):
            agrees(x, y, "transformers.DynamicCache", atol=0)
    assert len(ours) == theirs.get_seq_length()
    for length in (len(ours), len(ours) // 2, 1):
        if length < len(ours):
            ours.crop(length)
            theirs.crop(length - theirs.get_seq_length())  # theirs counts from the end
        layer = theirs.layers[0]
        agrees(ours.keys, layer.keys, "transformers.DynamicCache", atol=0)
        agrees(ours.values, layer.values, "transformers.DynamicCache", atol=0)


def test_an_empty_cache_has_no_length_no_bytes_and_no_tensors():
    for cache in (KVCache(), KVCache(4)):
        assert (len(cache), cache.nbytes) == (0, 0)
        assert cache.keys is None and cache.values is None
        cache.crop(0)
        assert cache.keys is None and cache.values is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_it_grows_by_the_bytes_of_each_token(dtype):
    cache = KVCache()
    for T in range(1, 4):
        cache.update(*(x.to(dtype) for x in tokens((2, 3, 4), 1)))
        size = torch.empty((), dtype=dtype).element_size()
        assert cache.nbytes == 2 * 2 * 3 * T * 4 * size
        assert cache.keys.dtype == cache.values.dtype == dtype


def test_with_max_length_one_buffer_is_held_from_the_start():
    cache, keys, _ = filled(9)
    assert cache.nbytes == 2 * 2 * 3 * 9 * 4 * 8
    before = keys.data_ptr(), cache.values.data_ptr()
    for _ in range(4):
        keys, values = cache.update(*tokens((2, 3, 4), 1))
        assert (keys.data_ptr(), values.data_ptr()) == before
    assert cache.nbytes == 2 * 2 * 3 * 9 * 4 * 8
    assert len(cache) == 9


def test_a_growing_cache_leaves_earlier_results_alone():
    cache, keys, values = filled(None)
    kept = keys.clone(), values.clone()
    cache.crop(2)
    cache.update(*tokens((2, 3, 4), 3))
    assert torch.equal(keys, kept[0]) and torch.equal(values, kept[1])


@both_kinds
def test_what_happens_to_the_inputs_later_does_not_reach_it(max_length):
    cache = KVCache(max_length)
    key, value = tokens((2, 3, 4), 5)
    kept = key.clone(), value.clone()
    cache.update(key, value)
    key.zero_()
    value.zero_()
    assert torch.equal(cache.keys, kept[0]) and torch.equal(cache.values, kept[1])


@both_kinds
def test_inputs_need_not_be_contiguous(max_length):
    cache = KVCache(max_length)
    key, value = tokens((2, 4, 3), 5)
    key, value = key.transpose(1, 3), value.transpose(1, 3)  # (2, 3, 5, 4)
    keys, values = cache.update(key, value)
    assert torch.equal(keys, key) and torch.equal(values, value)


@both_kinds
@pytest.mark.parametrize("length", range(6))
def test_after_a_crop_it_goes_on_from_the_first_tokens(length, max_length):
    cache, keys, values = filled(max_length)
    first = keys[:, :, :length].clone(), values[:, :, :length].clone()
    cache.crop(length)
    assert len(cache) == length
    assert torch.equal(cache.keys, first[0]) and torch.equal(cache.values, first[1])
    key, value = tokens((2, 3, 4), 4)
    keys, values = cache.update(key, value)
    assert len(cache) == length + 4
    assert torch.equal(keys, torch.cat((first[0], key), dim=2))
    assert torch.equal(values, torch.cat((first[1], value), dim=2))


def test_the_next_update_after_a_crop_frees_memory():
    cache, _, _ = filled(None)
    cache.crop(1)
    assert cache.nbytes == 2 * 2 * 3 * 5 * 4 * 8
    cache.update(*tokens((2, 3, 4), 1))
    assert cache.nbytes == 2 * 2 * 3 * 2 * 4 * 8


def test_gradients_flow_back_to_every_token():
    cache, inputs = KVCache(), []
    for T in (3, 1, 2):
        key, value = (x.requires_grad_() for x in tokens((2, 3, 4), T))
        inputs += [(key, value)]
        keys, values = cache.update(key, value)
    arriving = torch.randn_like(keys), torch.randn_like(values)
    torch.autograd.backward((keys, values), arriving)
    found = [torch.cat([pair[n].grad for pair in inputs], dim=2) for n in (0, 1)]
    assert torch.equal(found[0], arriving[0]) and torch.equal(found[1], arriving[1])


def unchanged(cache, before):
    keys, values, length, nbytes = before
    assert (len(cache), cache.nbytes) == (length, nbytes)
    if length:
        assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
    # and what is written next comes right behind
    key, value = tokens((2, 3, 4), 1)
    keys = key if not length else torch.cat((keys, key), dim=2)
    values = value if not length else torch.cat((values, value), dim=2)
    found = cache.update(key, value)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)


def state(cache):
    if cache.keys is None:
        return None, None, 0, 0
    return cache.keys.clone(), cache.values.clone(), len(cache), cache.nbytes


@pytest.mark.parametrize("held", [0, 5])
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_buffer_has_no_gradients(which, held, refuses):
    cache = filled(9, T=held)[0] if held else KVCache(9)
    before = state(cache)
    key, value = tokens((2, 3, 4), 2)
    {"key": key, "value": value}[which].requires_grad_()
    message = "max_length must be None where gradients are recorded"
    with refuses(RuntimeError, message):
        cache.update(key, value)
    unchanged(cache, before)
    with torch.no_grad():
        assert cache.update(key, value)[0].shape == (2, 3, held + 3, 4)


@pytest.mark.parametrize(("held", "T"), [(0, 10), (5, 5), (9, 1)])
def test_more_than_max_length_is_refused_before_anything_is_written(held, T, refuses):
    cache = filled(9, T=held)[0] if held else KVCache(9)
    before = state(cache)
    message = f"max_length must be at least {held + T}, got 9"
    with refuses(ValueError, message):
        cache.update(*tokens((2, 3, 4), T))
    if held == 9:
        assert torch.equal(cache.keys, before[0]) and len(cache) == 9
    else:
        unchanged(cache, before)


# A batch, heads or features that differ from those in the cache, on one side or both.
MISFITS = [(1, 3, 2, 4), (2, 1, 2, 4), (2, 3, 2, 1), (3, 2, 2, 4)]


@both_kinds
@pytest.mark.parametrize("shape", MISFITS, ids=str)
@pytest.mark.parametrize("both", [True, False])
def test_shapes_that_do_not_fit_the_cache_are_refused(shape, both, max_length, refuses):
    cache, _, _ = filled(max_length)
    before = state(cache)
    key, _ = tokens((2, 3, 4), 2)
    wrong = torch.randn(shape, dtype=torch.float64)
    name = "key" if both else "value"
    message = f"{name} must be (B, H, T, d_k) = (2, 3, 2, 4), got {shape}"
    with refuses(ValueError, message):
        cache.update(wrong if both else key, wrong)
    unchanged(cache, before)


@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (2, 3, 2, 3), (2, 3, 2), ()], ids=str)
def test_a_value_unlike_its_key_is_refused_by_an_empty_cache(shape, refuses):
    cache = KVCache()
    key, _ = tokens((2, 3, 4), 2)
    message = f"value must be (B, H, T, d_k) = (2, 3, 2, 4), got {shape}"
    with refuses(ValueError, message):
        cache.update(key, torch.randn(shape))
    unchanged(cache, state(KVCache()))


@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (3, 4), (4,), (), (1, 2, 3, 2, 4)], ids=str
)
@pytest.mark.parametrize("held", [0, 5])
def test_keys_that_are_not_4_d_are_refused(shape, held, refuses):
    cache = filled(None)[0] if held else KVCache()
    with pytest.raises(ValueError, match=r"^key must be \(B, H, T, d_k\) = ") as error:
        cache.update(torch.randn(shape), torch.randn(shape))
    assert str(error.value).endswith(f", got {shape}")
    assert len(cache) == held


@both_kinds
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dtype": torch.float32}, "torch.float32 on cpu"),
        ({"dtype": torch.bfloat16}, "torch.bfloat16 on cpu"),
        ({"device": "meta"}, "torch.float64 on meta"),
    ],
    ids=str,
)
def test_another_dtype_or_device_is_refused(other, said, which, max_length, refuses):
    cache, _, _ = filled(max_length)
    before = state(cache)
    new = dict(zip(("key", "value"), tokens((2, 3, 4), 2), strict=True))
    new[which] = new[which].to(**other)
    with refuses(TypeError, f"{which} must be torch.float64 on cpu, got {said}"):
        cache.update(**new)
    unchanged(cache, before)


def test_a_value_of_another_dtype_than_its_key_is_refused(refuses):
    key, value = tokens((2, 3, 4), 2)
    with refuses(
        TypeError, "value must be torch.float64 on cpu, got torch.float32 on cpu"
    ):
        KVCache().update(key, value.float())


@both_kinds
def test_it_lives_on_the_device_of_its_inputs(max_length):
    cache = KVCache(max_length)
    for _ in range(2):
        keys, values = cache.update(*(x.to("meta") for x in tokens((2, 3, 4), 2)))
        assert keys.device.type == values.device.type == "meta"
    assert keys.shape == values.shape == (2, 3, 4, 4)


@both_kinds
@pytest.mark.parametrize("length", [-1, 6])
def test_a_crop_out_of_range_is_refused(length, max_length, refuses):
    cache, _, _ = filled(max_length)
    before = state(cache)
    with refuses(ValueError, f"length must be in 0..5, got {length}"):
        cache.crop(length)
    unchanged(cache, before)


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_cache_without_room_is_refused(max_length, refuses):
    with refuses(ValueError, f"max_length must be at least 1, got {max_length}"):
        KVCache(max_length)


def test_a_cache_of_one_token_has_room_for_one():
    cache = KVCache(1)
    cache.update(*tokens((2, 3, 4), 1))
    assert len(cache) == 1


@pytest.mark.parametrize("max_length", [None, 8])
def test_it_compiles(max_length, compiles):
    def function(key, value, query):
        cache = KVCache(max_length)
        cache.update(key, value)
        keys, values = cache.update(key[:, :, :1], value[:, :, :1])
        return torch.softmax(query @ keys.mT, dim=-1) @ values

    calls = [(*tokens((2, 3, 4), T), tokens((2, 3, 4), 1)[0]) for T in (3, 5)]
    compiles(function, *calls)


# --- bytes ---------------------------------------------------------------------------


def test_models_by_their_published_shapes():
    GiB = 2**30
    assert kv_cache_bytes(32, 32, 128, 4096) == 2 * GiB  # Llama 2 7B
    assert kv_cache_bytes(32, 8, 128, 8192) == 1 * GiB  # Llama 3 8B: grouped queries
    assert kv_cache_bytes(96, 96, 128, 2048) == 9 * GiB  # GPT-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_the_bytes_are_those_of_the_tensors(dtype):
    caches = [KVCache() for _ in range(5)]
    for cache in caches:
        cache.update(*(x.to(dtype) for x in tokens((3, 2, 8), 7)))
    size = dtype.itemsize
    assert sum(cache.nbytes for cache in caches) == kv_cache_bytes(
        5, 2, 8, 7, batch_size=3, bytes_per_element=size
    )


def test_by_default_one_sequence_of_two_bytes_an_element():
    assert kv_cache_bytes(3, 5, 7, 11) == 2 * 3 * 5 * 7 * 11 * 2
    assert isinstance(kv_cache_bytes(3, 5, 7, 11), int)


SIZES = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "seq_len": 5}
SIZES |= {"batch_size": 6, "bytes_per_element": 7}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_numbers_below_one_are_refused(name, value, refuses):
    with refuses(ValueError, f"{name} must be at least 1, got {value}"):
        kv_cache_bytes(**{**SIZES, name: value})
    assert kv_cache_bytes(**{**SIZES, name: 1}) > 0
