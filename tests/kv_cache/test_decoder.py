"""The decoder against torch's encoder with a mask, transformers' MPT, and itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.kv_cache.cache import KVCache
from snippets.kv_cache.decoder import CausalSelfAttention, DecoderLM, generate

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
    found = generate(model, ids, 8, caches)
    assert found.shape == (size[0], size[1] + 8)
    assert torch.equal(found[:, : size[1]], ids)
    assert torch.equal(found, generate(model, ids, 8))
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
    assert torch.equal(generate(model, ids, 8, new_caches(model)), expected)


def test_each_token_is_the_likeliest_after_those_before(randomize):
    size = SIZES[0]
    model, ids = random_model(size, randomize), random_ids(size)
    found = generate(model, ids, 4)
    assert torch.equal(model(found)[:, 4:-1].argmax(dim=-1), found[:, 5:])


def test_of_equally_likely_tokens_the_first_is_taken():
    model = DecoderLM(5, 4, 2, 1, 8)
    nn.init.zeros_(model.embedding.weight)
    ids = torch.tensor([[3, 2]])
    assert generate(model, ids, 3, new_caches(model)).tolist() == [[3, 2, 0, 0, 0]]


def test_nothing_to_generate_returns_the_prompt(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches = new_caches(model)
    assert torch.equal(generate(model, ids, 0, caches), ids)
    assert [len(cache) for cache in caches] == [0, 0]


def test_generating_records_no_gradients(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    caches = new_caches(model)
    generate(model, ids, 2, caches)
    assert not any(cache.keys.requires_grad for cache in caches)


def test_the_prompt_is_read_once_and_then_a_token_at_a_time(randomize):
    model, ids = random_model(SIZES[0], randomize), random_ids(SIZES[0])
    read = []
    model.embedding.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )
    generate(model, ids, 4, new_caches(model))
    assert read == [5, 1, 1, 1]
    read.clear()
    generate(model, ids, 4)
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
        generate(model, ids.to(torch.int64), 1, new_caches(model))


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
        generate(model, random_ids(SIZES[0]), -1)


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


def test_it_lives_on_the_device_of_its_inputs(randomize):
    size = SIZES[0]
    model = DecoderLM(*size[2:], 16).to("meta")
    caches = new_caches(model)
    ids = random_ids(size).to("meta")
    for _ in range(2):
        assert model(ids, caches).shape == (2, 5, 11)
    assert caches[0].keys.device.type == "meta"
    assert generate(model, ids, 2, new_caches(model)).device.type == "meta"


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
