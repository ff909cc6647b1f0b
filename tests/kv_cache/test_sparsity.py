"""Top-k and threshold against torch's pruning, bytes against its sparse tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.prune import L1Unstructured

from snippets.kv_cache.sparsity import (
    coo_bytes,
    density,
    threshold_sparsify,
    topk_sparsify,
)

NAN, INF = float("nan"), float("inf")
SHAPES = [(5,), (1,), (4, 6), (2, 3, 4, 8), (1, 1, 7), (0, 5), (5, 0), (2, 0, 3)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pruned(x, k, dim):
    """Along each line of a dimension torch prunes all but k entries."""
    lines = x.movedim(dim, -1)
    count, size = x.numel() // max(x.shape[dim], 1), x.shape[dim]
    flat = lines.reshape(count, size)
    pruning = L1Unstructured(amount=size - k)
    masks = [
        pruning.compute_mask(line, torch.ones_like(line)) for line in flat.detach()
    ]
    flat = flat * torch.stack(masks) if masks else flat
    return flat.reshape(lines.shape).movedim(-1, dim)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        *[((3, 3), -1), ((3, 3), 0), ((4, 6), 1), ((4, 6), -2), ((6,), 0), ((1,), -1)],
        *[((2, 3, 4, 8), -1), ((2, 3, 4, 8), 2), ((2, 3, 4, 8), -4), ((0, 5), 1)],
        ((5, 0), -2),
    ],
    ids=str,
)
def test_top_k_is_what_pruning_by_magnitude_leaves(shape, dim, agrees_with_gradients):
    for k in range(shape[dim] + 1):
        agrees_with_gradients(
            lambda x, k=k: topk_sparsify(x, k, dim),
            lambda x, k=k: pruned(x, k, dim),
            torch.randn(shape, dtype=torch.float64),
            against="torch.nn.utils.prune.L1Unstructured",
            atol=0,
        )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
def test_the_threshold_is_a_hard_shrinkage(shape, threshold, agrees_with_gradients):
    agrees_with_gradients(
        lambda x: threshold_sparsify(x, threshold),
        lambda x: F.hardshrink(x, threshold),
        torch.randn(shape, dtype=torch.float64),
        against="F.hardshrink",
        atol=0,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_stays_is_unchanged_in_every_precision(dtype, agrees_with_gradients):
    x = torch.randn(4, 100, dtype=dtype)
    wide = x.double()
    ours = topk_sparsify(x, 10), threshold_sparsify(x, 0.5)
    assert [y.dtype for y in ours] == [dtype, dtype]
    # bfloat16 has ties: whatever stays is at least as large as whatever goes.
    kept, gone = ours[0] != 0, ours[0] == 0
    assert (kept.sum(-1) == 10).all()
    lowest = wide.abs().masked_fill(~kept, INF).amin(-1)
    assert (lowest >= wide.abs().masked_fill(~gone, 0).amax(-1)).all()
    assert torch.equal(ours[0][kept], x[kept])
    assert torch.equal(ours[1], x * (wide.abs() >= 0.5))


def test_the_numbers_of_the_notes_come_out_both_ways():
    x = torch.tensor([0.01, 0.50, 0.03, 0.70, 0.02])
    expected = torch.tensor([0, 0.50, 0, 0.70, 0])
    assert torch.equal(topk_sparsify(x, 2), expected)
    assert torch.equal(threshold_sparsify(x, 0.05), expected)


def test_size_counts_and_the_sign_does_not():
    x = torch.tensor([-0.9, 0.1, 0.5])
    assert topk_sparsify(x, 1).tolist() == [x[0].item(), 0, 0]
    assert threshold_sparsify(x, 0.5).tolist() == [x[0].item(), 0, 0.5]


@pytest.mark.parametrize("k", range(6))
def test_of_equal_entries_the_first_stay_and_exactly_k_do(k):
    x = torch.tensor([[2.0, -2.0, 2.0, 2.0, -2.0], [1.0, 3.0, -1.0, 1.0, -3.0]])
    order = [[0, 1, 2, 3, 4], [1, 4, 0, 2, 3]]
    expected = torch.zeros_like(x)
    for row, places in enumerate(order):
        for place in places[:k]:
            expected[row, place] = x[row, place]
    assert torch.equal(topk_sparsify(x, k), expected)
    long = torch.ones(3, 5000)  # where an unstable sort mixes
    assert torch.equal(topk_sparsify(long, k), long * (torch.arange(5000) < k))


def test_zeros_count_as_kept_where_there_is_nothing_else():
    x = torch.tensor([0.0, 0.0, 3.0])
    assert topk_sparsify(x, 2).tolist() == [0, 0, 3]


def test_all_may_stay_and_all_may_go():
    x = torch.randn(3, 7)
    assert torch.equal(topk_sparsify(x, 7), x)
    assert torch.equal(topk_sparsify(x, 0), torch.zeros(3, 7))
    assert torch.equal(threshold_sparsify(x, 0), x)
    assert torch.equal(threshold_sparsify(x, INF), torch.zeros(3, 7))
    assert topk_sparsify(torch.tensor([2.0]), 1).tolist() == [2.0]


def test_an_entry_that_equals_the_threshold_stays():
    x = torch.tensor([0.05, -0.05, 0.049, 0.0])
    assert threshold_sparsify(x, 0.05).tolist() == [*x[:2].tolist(), 0, 0]
    assert threshold_sparsify(x, x[0].item()).tolist() == [*x[:2].tolist(), 0, 0]


def test_nan_is_never_hidden():
    x = torch.tensor([5.0, NAN, -INF, 1.0])
    torch.testing.assert_close(
        topk_sparsify(x, 1), torch.tensor([0, NAN, 0, 0]), equal_nan=True
    )
    torch.testing.assert_close(
        topk_sparsify(x, 2), torch.tensor([0, NAN, -INF, 0]), equal_nan=True
    )
    torch.testing.assert_close(
        threshold_sparsify(x, 2.0), torch.tensor([5.0, NAN, -INF, 0]), equal_nan=True
    )
    assert threshold_sparsify(x, INF).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("method", [topk_sparsify, threshold_sparsify])
def test_a_nan_or_infinity_that_goes_leaves_no_nan_in_value_or_gradient(method):
    x = torch.tensor([INF, NAN, NAN, -INF, 1.0], requires_grad=True)
    out = topk_sparsify(x, 1) if method is topk_sparsify else method(x, 2.0)
    (grad,) = torch.autograd.grad(out, x, torch.full((5,), 3.0))
    kept = [0, 1, 0, 0, 0] if method is topk_sparsify else [1, 1, 1, 1, 0]
    assert grad.tolist() == [3.0 * k for k in kept]
    assert (out[torch.tensor(kept) == 0] == 0).all()


@pytest.mark.parametrize("method", [topk_sparsify, threshold_sparsify])
def test_the_input_is_not_modified_and_need_not_be_contiguous(method):
    base = torch.randn(8, 5, 6)
    x = base.permute(2, 0, 1)[:, ::2]
    copy = x.clone()
    assert not x.is_contiguous()
    assert torch.equal(method(x, 2), method(x.contiguous(), 2))
    assert torch.equal(x, copy)


def test_device_follows_the_input():
    x = torch.empty(3, 4, device="meta")
    for out in (topk_sparsify(x, 2), threshold_sparsify(x, 0.5)):
        assert out.is_meta and out.shape == (3, 4)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(low):
    x = torch.randn(4, 9)
    exact = topk_sparsify(x, 3), threshold_sparsify(x, 0.3)
    with torch.autocast("cpu", low):
        found = topk_sparsify(x, 3), threshold_sparsify(x, 0.3)
    assert all(map(torch.equal, found, exact))


def test_it_compiles_to_one_graph(compiles):
    def both(x):
        return topk_sparsify(x, 3), threshold_sparsify(x, 0.5)

    compiles(both, (torch.randn(4, 8),), (torch.randn(3, 8),))


@pytest.mark.parametrize(
    "dtype", [*FLOATS, torch.int8, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
def test_bytes_are_those_of_torchs_sparse_tensor(shape, dtype):
    x = (torch.randn(shape) * (torch.rand(shape) < 0.4)).to(dtype)
    sparse = x.to_sparse()
    assert coo_bytes(x) == sparse.indices().nbytes + sparse.values().nbytes
    assert type(coo_bytes(x)) is int


def test_density_is_the_share_that_is_not_zero():
    assert density(torch.tensor([[0.0, -0.0, 2.0, NAN]])) == 0.5
    assert density(torch.tensor(3)) == 1.0
    assert density(torch.zeros(3, 2)) == 0.0
    x = topk_sparsify(torch.randn(10, 128), 32)
    assert density(x) == 0.25 and type(density(x)) is float


def test_a_quarter_of_a_matrix_costs_more_as_a_list_of_coordinates_than_whole():
    x = torch.randn(1000, 128)
    assert x.nbytes == 512_000
    assert coo_bytes(topk_sparsify(x, 32)) == 640_000
    assert coo_bytes(topk_sparsify(x, 25)) == 500_000  # 20 bytes against 4: a fifth


@pytest.mark.parametrize("k", [-1, 6, 10, NAN])
def test_k_that_is_not_a_count_of_entries_is_refused(k, refuses):
    with refuses(ValueError, f"k must be from 0 to 5, got {k}"):
        topk_sparsify(torch.randn(4, 5), k)
    with refuses(ValueError, f"k must be from 0 to 4, got {k}"):
        topk_sparsify(torch.randn(4, 5), k, dim=0)


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 5), 2), ((4, 5), -3), ((), -1), ((), 0)]
)
def test_a_dimension_that_x_does_not_have_is_refused(shape, dim, refuses):
    with refuses(ValueError, f"dim must be a dimension of x {shape}, got {dim}"):
        topk_sparsify(torch.randn(shape), 1, dim)


@pytest.mark.parametrize("threshold", [-0.1, -INF, NAN])
def test_thresholds_below_zero_are_refused(threshold, refuses):
    with refuses(ValueError, f"threshold must be at least 0, got {threshold}"):
        threshold_sparsify(torch.randn(3), threshold)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("method", [topk_sparsify, threshold_sparsify])
def test_what_is_no_float_is_refused(method, dtype, refuses):
    with refuses(TypeError, f"x must be float, got {dtype}"):
        method(torch.ones(3, dtype=dtype), 1)


def test_the_density_of_nothing_is_refused(refuses):
    with refuses(ValueError, "x must have entries, got shape (0, 3)"):
        density(torch.zeros(0, 3))
    assert coo_bytes(torch.zeros(0, 3)) == 0
