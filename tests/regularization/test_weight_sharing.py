"""The tied embedding against nn.Embedding and F.linear with one weight."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.regularization.weight_sharing import TiedEmbedding


class TorchsTied(nn.Module):
    """The usual two layers, of which one is given the weight of the other."""

    def __init__(self, vocab_size, dim):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.output.weight = self.embedding.weight


@pytest.fixture
def pair(randomize):
    ours, theirs = TiedEmbedding(11, 6).double(), TorchsTied(11, 6).double()
    theirs.embedding.load_state_dict(randomize(ours).state_dict())
    return ours, theirs


IDS = [
    torch.tensor([[1, 4, 4], [0, 10, 4]]),
    torch.tensor([3]),
    torch.tensor(3),
    torch.empty(2, 0, dtype=torch.long),
]


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
def test_both_uses_and_the_gradient_of_both_are_those_of_torch(ids, pair, agrees):
    ours, theirs = pair
    core = nn.Linear(6, 6).double()

    def run(embed, logits, weight):
        embedded = embed(ids)
        scores = logits(torch.tanh(core(embedded)))
        torch.manual_seed(0)
        upstream = torch.randn_like(scores)
        return embedded, scores, *torch.autograd.grad(scores, weight, upstream)

    found = run(ours.embed, ours.logits, ours.weight)
    expected = run(theirs.embedding, theirs.output, theirs.embedding.weight)
    for x, y in zip(found, expected, strict=True):
        agrees(x, y, "nn.Embedding and nn.Linear with one weight", atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0)]
)
@pytest.mark.parametrize("shape", [(2, 3, 6), (4, 6), (6,), (0, 6)])
def test_logits_are_dot_products_with_every_row(shape, dtype, atol, agrees):
    ours = TiedEmbedding(11, 6).to(dtype)
    hidden = torch.randn(shape, dtype=dtype)
    agrees(ours.logits(hidden), F.linear(hidden, ours.weight), "F.linear", atol)
    naive = (hidden[..., None, :].double() * ours.weight.double()).sum(-1)
    # bfloat16 rounds the result to 8 bits
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(
        ours.logits(hidden).double(), naive, atol=tolerance, rtol=tolerance
    )


def test_a_step_on_the_output_changes_what_is_looked_up():
    ours = TiedEmbedding(5, 3)
    ids = torch.arange(5)
    before = ours.embed(ids).detach().clone()
    F.cross_entropy(
        ours.logits(torch.randn(4, 3)), torch.tensor([0, 1, 2, 3])
    ).backward()
    torch.optim.SGD(ours.parameters(), lr=1.0).step()
    assert (ours.embed(ids) != before).all()
    assert torch.equal(ours.embed(ids), ours.weight)


def test_there_is_one_parameter_of_the_name_that_nn_embedding_has():
    ours = TiedEmbedding(11, 6)
    assert {n: p.shape for n, p in ours.named_parameters()} == {"weight": (11, 6)}
    assert ours.state_dict().keys() == nn.Embedding(11, 6).state_dict().keys()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_the_tie_however_it_is_done(assign):
    ours = TiedEmbedding(11, 6)
    weight = torch.randn(11, 6)
    ours.load_state_dict({"weight": weight}, assign=assign)
    assert torch.equal(ours.embed(torch.arange(11)), weight)
    assert torch.equal(ours.logits(torch.eye(6)), weight.T)
    ours.weight = nn.Parameter(torch.zeros(11, 6))
    assert not ours.embed(torch.arange(11)).any()
    assert not ours.logits(torch.eye(6)).any()


@pytest.mark.parametrize("dim", [4, 64, 256])
def test_logits_start_with_the_variance_of_the_hidden_vector(dim):
    ours = TiedEmbedding(2000, dim)
    assert abs(ours.weight.std() * math.sqrt(dim) - 1) < 0.05
    assert ours.weight.mean().abs() < 5 / math.sqrt(dim * 2000 * dim)
    assert abs(ours.logits(torch.randn(50, dim)).std() - 1) < 0.15
    first = ours.weight.detach().clone()
    ours.reset_parameters()
    assert (ours.weight != first).all()


def test_inputs_are_not_modified_and_need_not_be_contiguous():
    ours = TiedEmbedding(11, 6)
    hidden, ids = torch.randn(6, 4).T, torch.tensor([[1, 2], [3, 4]]).T
    copies = hidden.clone(), ids.clone()
    torch.testing.assert_close(ours.logits(hidden), ours.logits(hidden.contiguous()))
    assert torch.equal(ours.embed(ids), ours.embed(ids.contiguous()))
    assert torch.equal(hidden, copies[0]) and torch.equal(ids, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_rounds_where_torchs_layers_round(dtype, pair, agrees):
    ours, theirs = (module.float() for module in pair)
    ids, hidden = torch.tensor([[1, 4], [0, 10]]), torch.randn(2, 6)
    with torch.autocast("cpu", dtype):
        agrees(ours.embed(ids), theirs.embedding(ids), "nn.Embedding", atol=0)
        agrees(ours.logits(hidden), theirs.output(hidden), "nn.Linear", atol=0)
        assert ours.embed(ids).dtype == torch.float32
        assert ours.logits(hidden).dtype == dtype


def test_what_is_returned_is_contiguous():
    ours = TiedEmbedding(11, 6)
    ids, hidden = torch.randint(11, (3, 4)), torch.randn(6, 3, 4)
    assert ours.embed(ids).is_contiguous() and ours.embed(ids.T).is_contiguous()
    assert ours.logits(hidden.permute(2, 1, 0)).is_contiguous()


def test_it_compiles_for_every_batch_size(compiles):
    ours = TiedEmbedding(11, 6)
    calls = ((torch.randint(11, (B, 5)),) for B in (4, 3))
    compiles(lambda ids: ours.logits(ours.embed(ids)), *calls)


def test_weights_that_do_not_all_fit_are_not_loaded():
    for other in (nn.Linear(6, 11), nn.Embedding(12, 6)):
        with pytest.raises(RuntimeError, match="loading state_dict"):
            TiedEmbedding(11, 6).load_state_dict(other.state_dict())


def test_the_meta_device_works():
    ours = TiedEmbedding(11, 6)
    ours.to("meta")
    hidden = ours.embed(torch.zeros(2, 3, dtype=torch.long, device="meta"))
    assert hidden.shape == (2, 3, 6) and ours.logits(hidden).shape == (2, 3, 11)


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="out of range"):
        TiedEmbedding(11, 6).embed(torch.tensor([11]))


@pytest.mark.parametrize(("vocab_size", "dim"), [(0, 3), (-1, 3), (3, 0), (3, -1)])
def test_sizes_below_one_are_refused(vocab_size, dim, refuses):
    message = f"vocab_size and dim must be at least 1, got {vocab_size} and {dim}"
    with refuses(ValueError, message):
        TiedEmbedding(vocab_size, dim)


def test_one_token_and_one_feature_are_enough():
    ours = TiedEmbedding(1, 1)
    assert ours.logits(ours.embed(torch.tensor([0]))).shape == (1, 1)


@pytest.mark.parametrize("shape", [(), (5,), (6, 5), (2, 6, 1)])
def test_another_width_is_refused(shape, refuses):
    with refuses(ValueError, f"hidden must be (..., 6), got {shape}"):
        TiedEmbedding(11, 6).logits(torch.zeros(shape))
