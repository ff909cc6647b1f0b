"""The cache against transformers' DynamicCache; the decoder against torch and MPT."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.kv_cache.cache import (
    CausalSelfAttention,
    DecoderLM,
    KVCache,
    generate,
    kv_cache_bytes,
)

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


NUMBERS = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "seq_len": 5}
NUMBERS |= {"batch_size": 6, "bytes_per_element": 7}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_below_one_are_refused(name, value, refuses):
    with refuses(ValueError, f"{name} must be at least 1, got {value}"):
        kv_cache_bytes(**{**NUMBERS, name: value})
    assert kv_cache_bytes(**{**NUMBERS, name: 1}) > 0


# --- the decoder ----------------------------------------------------------------------

# B, T, vocab_size, dim, num_heads, num_layers
SIZES = [
    (2, 5, 11, 8, 2, 2),
    (1, 7, 5, 12, 3, 1),
    (3, 4, 7, 8, 8, 3),
    (2, 1, 3, 4, 1, 2),
    (1, 1, 1, 1, 1, 1),
]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
MPT = "transformers.MptForCausalLM"


def random_model(size, randomize, dtype=torch.float64, max_length=16):
    return randomize(DecoderLM(*size[2:], max_length)).to(dtype)


def random_ids(size, T=None):
    return torch.randint(size[2], (size[0], size[1] if T is None else T))


def new_caches(model, max_length=None):
    return [KVCache(max_length) for _ in model.blocks]


def slopes_and_mask(T, num_heads):
    """What is added to the scores, written down number by number."""
    added = torch.full((num_heads, T, T), -torch.inf, dtype=torch.float64)
    for head, query in itertools.product(range(num_heads), range(T)):
        for key in range(query + 1):
            added[head, query, key] = -(query - key) / 2 ** (head + 1)
    return added


class Reference(nn.Module):
    """The same parameters in modules of torch."""

    def __init__(self, vocab_size, dim, num_heads, num_layers, dtype):
        super().__init__()
        self.num_heads = num_heads
        layer = nn.TransformerEncoderLayer(
            dim,
            num_heads,
            4 * dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.TransformerEncoder(
            layer, num_layers, nn.LayerNorm(dim, bias=False), enable_nested_tensor=False
        ).to(dtype)
        self.to(dtype)

    def forward(self, ids):
        (B, T), H = ids.shape, self.num_heads
        mask = slopes_and_mask(T, H).repeat(B, 1, 1).to(self.embedding.weight.dtype)
        return self.blocks(self.embedding(ids), mask) @ self.embedding.weight.T


def pair(size, randomize):
    ours = random_model(size, randomize)
    theirs = Reference(*size[2:], dtype=torch.float64)
    renamed = {}
    for name, weight in ours.state_dict().items():
        name = name.replace("in_proj.weight", "in_proj_weight")
        name = name.replace("blocks.", "blocks.layers.")
        renamed["blocks.norm.weight" if name == "norm.weight" else name] = weight
    theirs.load_state_dict(renamed, strict=True)
    return ours, theirs


def gradients(module, output, arriving):
    found = torch.autograd.grad(output, list(module.parameters()), arriving)
    return dict(zip([n for n, _ in module.named_parameters()], found, strict=True))


@every_size
def test_logits_and_gradients_are_those_of_an_encoder_with_a_mask(
    size, randomize, agrees
):
    ours, theirs = pair(size, randomize)
    ids = random_ids(size)
    found, expected = ours(ids), theirs(ids)
    against = "nn.TransformerEncoder"
    agrees(found, expected, against, atol=1e-10)
    arriving = torch.randn_like(found)
    found = gradients(ours, found, arriving)
    expected = gradients(theirs, expected, arriving)
    assert len(found) == len(expected)
    for name, gradient in found.items():
        name = name.replace("in_proj.weight", "in_proj_weight")
        name = name.replace("blocks.", "blocks.layers.")
        name = "blocks.norm.weight" if name == "norm.weight" else name
        agrees(gradient, expected[name], against, atol=1e-10, rtol=1e-10)


def compositions(T):
    """All ways to cut T tokens into pieces."""
    for cuts in itertools.product([False, True], repeat=T - 1):
        places = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), T]
        yield list(itertools.pairwise(places))


@every_size
def test_in_every_chunking_logits_and_gradients_are_those_of_the_whole(
    size, randomize, agrees
):
    model, ids = random_model(size, randomize), random_ids(size)
    whole = model(ids)
    arriving = torch.randn_like(whole)
    expected = gradients(model, whole, arriving)
    for chunks in compositions(ids.shape[1]):
        caches = new_caches(model)
        pieces = [model(ids[:, start:end], caches) for start, end in chunks]
        assert {len(cache) for cache in caches} == {ids.shape[1]}
        logits = torch.cat(pieces, dim=1)
        agrees(logits, whole, "the pass without a cache", atol=1e-12)
        for name, gradient in gradients(model, logits, arriving).items():
            agrees(gradient, expected[name], "the pass without a cache", atol=1e-10)


@every_size
@torch.no_grad()
def test_a_buffer_gives_the_same_logits_as_a_growing_cache(size, randomize):
    model, ids = random_model(size, randomize), random_ids(size)
    whole = model(ids)
    for chunks in compositions(ids.shape[1]):
        caches = new_caches(model, max_length=ids.shape[1])
        pieces = [model(ids[:, start:end], caches) for start, end in chunks]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=0)


@torch.no_grad()
def test_after_a_crop_another_text_goes_on(randomize):
    size = SIZES[0]
    model, ids = random_model(size, randomize), random_ids(size, 9)
    for max_length in (None, 9):
        caches = new_caches(model, max_length)
        model(torch.cat((ids[:, :4], random_ids(size, 3)), dim=1), caches)
        for cache in caches:
            cache.crop(4)
        torch.testing.assert_close(model(ids[:, 4:], caches), model(ids)[:, 4:])


def mpt(model, size, reference_library):
    """MPT with our weights. Its slopes are ours for eight heads."""
    transformers = reference_library("transformers")
    _, _, V, dim, H, layers = size
    config = transformers.MptConfig(
        d_model=dim, n_heads=H, n_layers=layers, vocab_size=V, max_seq_len=16
    )
    theirs = transformers.MptForCausalLM(config).eval()
    names = {
        "embedding": "transformer.wte",
        "self_attn.in_proj": "attn.Wqkv",
        "self_attn.out_proj": "attn.out_proj",
        "linear1": "ffn.up_proj",
        "linear2": "ffn.down_proj",
        "norm1": "norm_1",
        "norm2": "norm_2",
    }
    renamed = {}
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        name = "norm_f.weight" if name == "norm.weight" else name
        name = name if name.startswith("transformer") else f"transformer.{name}"
        renamed[name] = weight
    theirs.load_state_dict(renamed | {"lm_head.weight": model.embedding.weight})
    return theirs, transformers.DynamicCache()


@torch.no_grad()
def test_logits_and_caches_are_those_of_mpt(randomize, agrees, reference_library):
    size = 3, 6, 7, 16, 8, 3
    model = random_model(size, randomize, torch.float32)
    theirs, cache = mpt(model, size, reference_library)
    ids, caches = random_ids(size), new_caches(model)
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        found = model(ids[:, start:end], caches)
        expected = theirs(
            ids[:, start:end], past_key_values=cache, use_cache=True
        ).logits
        agrees(found, expected, MPT, atol=1e-4, rtol=1e-4)
        for ours, layer in zip(caches, cache.layers, strict=True):
            agrees(ours.keys, layer.keys, MPT, atol=1e-4)
            agrees(ours.values, layer.values, MPT, atol=1e-4)


@every_size
@pytest.mark.parametrize("max_length", [None, 16])
def test_a_cache_does_not_change_what_is_generated(size, max_length, randomize):
    model, ids = random_model(size, randomize), random_ids(size)
    caches = new_caches(model, max_length)
    found = generate(model, ids, 8, caches=caches)
    assert found.shape == (size[0], size[1] + 8)
    assert torch.equal(found[:, : size[1]], ids)
    assert torch.equal(found, generate(model, ids, 8, use_cache=False))
    assert {len(cache) for cache in caches} == {size[1] + 7}  # the last is not read


def test_what_is_generated_is_what_mpt_generates(randomize, reference_library):
    size = 3, 6, 7, 16, 8, 3
    model = random_model(size, randomize, torch.float32)
    theirs, _ = mpt(model, size, reference_library)
    ids = random_ids(size)
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, ids, 8, caches=new_caches(model)), expected)


def test_each_token_is_the_likeliest_after_those_before(randomize):
    size = SIZES[0]
    model, ids = random_model(size, randomize), random_ids(size)
    found = generate(model, ids, 4, use_cache=False)
    assert torch.equal(model(found)[:, 4:-1].argmax(dim=-1), found[:, 5:])


def test_of_equally_likely_tokens_the_first_is_taken():
    model = DecoderLM(5, 4, 2, 1, 8)
    nn.init.zeros_(model.embedding.weight)
    ids = torch.tensor([[3, 2]])
    assert generate(model, ids, 3, caches=new_caches(model)).tolist() == [
        [3, 2, 0, 0, 0]
    ]


def test_nothing_to_generate_returns_the_prompt(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches = new_caches(model)
    assert torch.equal(generate(model, ids, 0, caches=caches), ids)
    assert [len(cache) for cache in caches] == [0, 0]


def test_generating_records_no_gradients(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches = new_caches(model)
    generate(model, ids, 2, caches=caches)
    assert not any(cache.keys.requires_grad for cache in caches)


def test_the_prompt_is_read_once_and_then_a_token_at_a_time(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    read = []
    model.embedding.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )
    generate(model, ids, 4, caches=new_caches(model))
    assert read == [5, 1, 1, 1]
    read.clear()
    generate(model, ids, 4, use_cache=False)
    assert read == [5, 6, 7, 8]


def test_what_comes_later_does_not_change_what_was_said(randomize):
    size = SIZES[0]
    model, ids = random_model(size, randomize), random_ids(size)
    for t in range(4):
        other = ids.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % size[2]
        assert torch.equal(model(other)[:, : t + 1], model(ids)[:, : t + 1])


def test_a_model_fits_its_max_length(randomize):
    size = 2, 6, 11, 8, 2, 2
    model, ids = random_model(size, randomize, max_length=6), random_ids(size)
    assert model(ids).shape == (2, 6, 11)
    caches = new_caches(model)
    model(ids[:, :5], caches)
    assert model(ids[:, 5:], caches).shape == (2, 1, 11)


@pytest.mark.parametrize(("held", "T"), [(0, 7), (4, 3), (6, 1)])
@torch.no_grad()
def test_a_text_longer_than_max_length_is_refused(held, T, randomize, refuses):
    size = SIZES[0]
    model = random_model(size, randomize, max_length=6)
    caches = new_caches(model)
    if held:
        model(random_ids(size, held), caches)
    message = f"ids must be (B, T) with T in 1..{6 - held}, got (2, {T})"
    with refuses(ValueError, message):
        model(random_ids(size, T), caches if held else None)
    assert [len(cache) for cache in caches] == [held, held]


@pytest.mark.parametrize("shape", [(2, 0), (5,), (), (2, 5, 1)], ids=str)
def test_ids_of_another_shape_are_refused(shape, randomize, refuses):
    model = random_model(SIZES[0], randomize)
    message = f"ids must be (B, T) with T in 1..16, got {shape}"
    ids = torch.zeros(shape, dtype=torch.int64)
    with refuses(ValueError, message):
        model(ids)
    with refuses(ValueError, message):
        generate(model, ids.to(torch.int64), 1, caches=new_caches(model))


@torch.no_grad()
def test_caches_of_different_lengths_are_refused(randomize, refuses):
    size = SIZES[2]
    model, ids = random_model(size, randomize), random_ids(size)
    caches = new_caches(model)
    model(ids, caches)
    caches[1].crop(3)
    message = "caches must be 3 different ones of one length, got lengths [4, 3, 4]"
    with refuses(ValueError, message):
        model(ids, caches)
    assert [len(cache) for cache in caches] == [4, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_too_few_and_too_many_caches_are_refused(count, randomize, refuses):
    size = SIZES[2]
    model = random_model(size, randomize)
    caches = [KVCache() for _ in range(count)]
    message = (
        f"caches must be 3 different ones of one length, got lengths {count * [0]}"
    )
    with refuses(ValueError, message):
        model(random_ids(size), caches)
    assert not any(map(len, caches))


def test_one_cache_for_all_blocks_is_refused(randomize, refuses):
    size = SIZES[2]
    model, cache, other = random_model(size, randomize), KVCache(), KVCache()
    message = "caches must be 3 different ones of one length, got lengths "
    with refuses(ValueError, f"{message}[0, 0, 0]"):
        model(random_ids(size), [cache, other, cache])
    with refuses(ValueError, f"{message}[0, 0, 0, 0]"):
        model(random_ids(size), [cache, other, KVCache(), cache])
    assert len(cache) == len(other) == 0


@torch.no_grad()
def test_a_full_buffer_refuses_before_any_block_writes(randomize, refuses):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches = new_caches(model, max_length=6)
    expected = model(ids, caches)
    with refuses(ValueError, "max_length must be at least 7, got 6"):
        model(ids[:, :2], caches)
    assert [len(cache) for cache in caches] == [5, 5]
    for cache in caches:
        cache.crop(4)
    torch.testing.assert_close(model(ids[:, 4:], caches), expected[:, 4:])


@pytest.mark.parametrize(
    ("dim", "num_heads"), [(8, 3), (4, 8), (0, 1), (8, 0), (-4, 2), (4, -2)]
)
def test_heads_that_do_not_divide_the_features_are_refused(dim, num_heads, refuses):
    message = f"{dim=} must be a positive multiple of {num_heads=}"
    with refuses(ValueError, message):
        CausalSelfAttention(dim, num_heads)
    if dim > 0:
        with refuses(ValueError, message):
            DecoderLM(5, dim, num_heads, 1, 4)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["vocab_size", "dim", "num_layers", "max_length"])
def test_sizes_below_one_are_refused(name, value, refuses):
    sizes = {"vocab_size": 1, "dim": 2, "num_layers": 1, "max_length": 1}
    sizes |= {name: value}
    got = ", ".join(f"{name}={size}" for name, size in sizes.items())
    with refuses(ValueError, f"sizes must be at least 1, got {got}"):
        DecoderLM(num_heads=2, **sizes)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 8), (2, 3, 1, 8), (2, 0, 8)], ids=str)
def test_tokens_of_another_shape_are_refused(shape, refuses):
    cache = KVCache()
    with refuses(ValueError, f"x must be (B, T >= 1, 8), got {shape}"):
        CausalSelfAttention(8, 2)(torch.zeros(shape), cache)
    assert len(cache) == 0


def test_a_negative_number_of_tokens_is_refused(randomize, refuses):
    model = random_model(SIZES[0], randomize)
    with refuses(ValueError, "max_new_tokens must be at least 0, got -1"):
        generate(model, random_ids(SIZES[0]), -1, use_cache=False)


def test_an_empty_batch_has_empty_logits(randomize):
    model = random_model(SIZES[0], randomize)
    caches = new_caches(model)
    assert model(torch.zeros(0, 3, dtype=torch.int64), caches).shape == (0, 3, 11)
    assert [len(cache) for cache in caches] == [3, 3]


def test_it_starts_with_even_guesses():
    model = DecoderLM(50, 64, 4, 3, 32)
    logits = model(torch.randint(50, (8, 32)))
    assert logits.std().item() == pytest.approx(1, abs=0.2)


@torch.no_grad()
def test_autocast_keeps_close_to_the_exact_logits(randomize):
    size = SIZES[0]
    model, ids = DecoderLM(*size[2:], 16), random_ids(size)
    exact = model.double()(ids)
    model, caches = model.float(), new_caches(model)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(ids)
        pieces = model(ids[:, :3], caches), model(ids[:, 3:], caches)
    assert caches[0].keys.dtype == torch.bfloat16
    # 8 bits of logits and activations of order 1
    torch.testing.assert_close(whole.double(), exact, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cat(pieces, 1).double(), exact, atol=0.05, rtol=0)


@torch.no_grad()
def test_in_bfloat16_it_stays_close_to_the_exact_logits(randomize):
    size = SIZES[0]
    model, ids = DecoderLM(*size[2:], 16).bfloat16(), random_ids(size)
    found = model(ids)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), model.double()(ids), atol=0.05, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_added_to_the_scores_has_the_dtype_of_the_queries(dtype, monkeypatch):
    # Kernels of other devices than the CPU refuse another one.
    added = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, mask):
        added.append(mask.dtype)
        return attention(q, k, v, mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    CausalSelfAttention(8, 2).to(dtype)(torch.randn(1, 3, 8, dtype=dtype))
    assert added == [dtype]


def test_the_decoder_lives_on_the_device_of_its_inputs(randomize):
    size = SIZES[0]
    model = DecoderLM(*size[2:], 16).to("meta")
    caches = new_caches(model)
    ids = random_ids(size).to("meta")
    for _ in range(2):
        assert model(ids, caches).shape == (2, 5, 11)
    assert caches[0].keys.device.type == "meta"
    assert generate(model, ids, 2, caches=new_caches(model)).device.type == "meta"


def test_the_model_compiles(randomize, compiles):
    size = SIZES[0]
    model = random_model(size, randomize, torch.float32)
    with torch.no_grad():
        compiles(model, (random_ids(size),), (random_ids(size, 3),))


def test_prefill_and_decoding_compile(randomize, compiles):
    size = SIZES[0]
    model = random_model(size, randomize, torch.float32)

    def function(prompt, token):
        caches = new_caches(model)
        model(prompt, caches)
        return model(token, caches)

    with torch.no_grad():
        calls = [(random_ids(size, T), random_ids(size, 1)) for T in (5, 3)]
        compiles(function, *calls)


def test_by_default_new_caches_are_used(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches, read = model.new_caches(), []
    assert [type(cache) for cache in caches] == [KVCache, KVCache]
    assert caches[0] is not caches[1] and caches[0].max_length is None
    model.embedding.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )
    found = generate(model, ids, 4)
    assert read == [5, 1, 1, 1]
    assert torch.equal(found, generate(model, ids, 4, use_cache=False))
    assert torch.equal(found, generate(model, ids, 4, caches=caches))
    assert [len(cache) for cache in caches] == [8, 8]
    assert torch.equal(found, generate(model, ids, 4, False, caches))
    assert [len(cache) for cache in caches] == [8, 8]  # not used
