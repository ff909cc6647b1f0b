"""Principal components against torch's SVD and scikit-learn's PCA."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.kv_cache.low_rank import compress, decompress, principal_components

SHAPES = [(40, 6, 3), (6, 40, 5), (7, 7, 7), (5, 1, 1), (2, 3, 1), (100, 16, 16)]
every_shape = pytest.mark.parametrize(("N", "D", "k"), SHAPES)


def rows(N, D, dtype=torch.float64):
    """Of columns that differ in size, correlate, and do not center on 0."""
    mixed = torch.randn(N, D) * torch.logspace(1, -1, D) @ torch.randn(D, D)
    return (mixed + 3 * torch.randn(D)).to(dtype)


def restored(x, k):
    basis, mean, _ = principal_components(x, k)
    return decompress(compress(x, basis, mean), basis, mean)


@every_shape
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)]
)
def test_the_squared_error_is_the_sum_of_the_discarded_squared_sigmas(
    N, D, k, dtype, rtol, agrees
):
    x = rows(N, D, dtype)
    sigma = torch.linalg.svdvals(x - x.mean(0))
    error = (restored(x, k) - x).square().sum()
    size = sigma.square().sum().item()
    against = "torch.linalg.svdvals, Eckart and Young"
    agrees(error, sigma[k:].square().sum(), against, atol=rtol * size)


@every_shape
def test_what_comes_back_is_the_truncated_svd_of_torch(N, D, k, agrees):
    x = rows(N, D)
    mean = x.mean(0)
    U, sigma, V = torch.linalg.svd(x - mean, full_matrices=False)
    truncated = U[:, :k] * sigma[:k] @ V[:k] + mean
    agrees(restored(x, k), truncated, "torch.linalg.svd, truncated", atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_no_other_directions_leave_less(k):
    x = rows(40, 6)
    least = (restored(x, k) - x).square().sum()
    basis, mean, _ = principal_components(x, k)
    for _ in range(50):
        other, _ = torch.linalg.qr(basis + 0.1 * torch.randn(6, k).double())
        error = (decompress(compress(x, other, mean), other, mean) - x).square().sum()
        assert error > least
    shifted = mean + 0.1 * torch.randn(6).double()
    back = decompress(compress(x, basis, shifted), basis, shifted)
    assert (back - x).square().sum() > least


@every_shape
def test_everything_is_that_of_scikit_learn(N, D, k, agrees, reference_library):
    PCA = reference_library("sklearn.decomposition").PCA
    x = rows(N, D)
    reference = PCA(k, svd_solver="full").fit(x.numpy())
    basis, mean, explained = principal_components(x, k)
    z = compress(x, basis, mean)
    against = "sklearn.decomposition.PCA"
    if k < N:  # the last of N directions through N points is any one
        agrees(basis.mT, torch.tensor(reference.components_), against, atol=1e-8)
        transformed = torch.tensor(reference.transform(x.numpy()))
        agrees(z, transformed, against, atol=1e-7)
    agrees(mean, torch.tensor(reference.mean_), against, atol=1e-12)
    kept = torch.tensor(reference.explained_variance_ratio_.sum())
    agrees(explained, kept, against, atol=1e-12)
    back = torch.tensor(reference.inverse_transform(reference.transform(x.numpy())))
    agrees(decompress(z, basis, mean), back, against, atol=1e-8)


@every_shape
def test_the_basis_is_orthonormal_and_its_largest_entries_are_positive(N, D, k):
    basis, _, _ = principal_components(rows(N, D), k)
    assert basis.shape == (D, k) and basis.is_contiguous()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(k).double())
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_signs_do_not_depend_on_those_of_the_data():
    x = rows(40, 6)
    (basis, mean, _), (mirrored, opposite, _) = (
        principal_components(s * x, 4) for s in (1, -1)
    )
    torch.testing.assert_close(mirrored, basis)
    torch.testing.assert_close(opposite, -mean)


def test_directions_come_in_the_order_of_their_variance():
    x = rows(40, 6)
    basis, mean, explained = principal_components(x, 6)
    variances = compress(x, basis, mean).var(0)
    assert (variances.diff() < 0).all()
    fewer, _, part = principal_components(x, 2)
    torch.testing.assert_close(fewer, basis[:, :2])
    torch.testing.assert_close(part, variances[:2].sum() / variances.sum())
    assert explained.item() == pytest.approx(1, abs=1e-12)


def test_two_points_by_hand():
    x = torch.tensor([[0.0, 1.0], [6.0, 9.0]])
    basis, mean, explained = principal_components(x, 1)
    torch.testing.assert_close(basis, torch.tensor([[0.6], [0.8]]))
    assert mean.tolist() == [3, 5] and explained.shape == ()
    assert explained.item() == pytest.approx(1)
    torch.testing.assert_close(
        compress(x, basis, mean), torch.tensor([[-5.0], [5.0]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("N", [30, 8])
def test_what_is_of_rank_k_comes_back_whole(N):
    x = torch.randn(N, 4).double() @ torch.randn(4, 20).double() + 5
    _, _, explained = principal_components(x, 4)
    assert explained.item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(restored(x, 4), x)
    assert (restored(x, 3) - x).norm() > 0.5


def test_keys_of_low_rank_have_exact_scores():
    keys = torch.randn(50, 4).double() @ torch.randn(4, 32).double()
    q = torch.randn(5, 32).double()
    torch.testing.assert_close(q @ restored(keys, 4).mT, q @ keys.mT)


@pytest.mark.parametrize("seed", range(5))
def test_directions_that_are_all_alike_can_not_be_left_out(seed):
    torch.manual_seed(seed)
    x = torch.randn(1000, 128)
    _, _, explained = principal_components(x, 32)
    # A quarter of the directions, and a little: they were chosen after the fact.
    assert 0.34 < explained < 0.41
    error = ((restored(x, 32) - x).norm() / (x - x.mean(0)).norm()).item()
    assert error == pytest.approx(math.sqrt(1 - explained.item()), abs=1e-4)


def test_the_matrix_of_the_notes_takes_a_quarter_and_the_basis():
    x = torch.randn(1000, 128)
    basis, mean, _ = principal_components(x, 32)
    z = compress(x, basis, mean)
    assert (x.nbytes, z.nbytes) == (512_000, 128_000)
    assert (basis.nbytes, mean.nbytes) == (16_384, 512)


def test_equal_rows_lose_nothing():
    x = torch.randn(6).double().expand(10, 6)
    basis, mean, explained = principal_components(x, 2)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2).double())
    assert explained == 1
    torch.testing.assert_close(decompress(compress(x, basis, mean), basis, mean), x)
    basis, mean, explained = principal_components(torch.zeros(4, 3), 1)
    assert explained == 1 and (mean == 0).all() and basis.norm() == 1


def test_one_row_is_its_own_mean():
    x = torch.randn(1, 5)
    _, mean, explained = principal_components(x, 1)
    assert explained == 1 and torch.equal(mean, x[0])
    assert torch.equal(restored(x, 1), x)


@pytest.mark.parametrize("size", [1e18, 1e25, 1e-25, 1e-38])
def test_very_large_and_very_small_values_keep_their_share(size):
    x = rows(40, 6, torch.float32)
    x = x / x.abs().max()
    _, _, expected = principal_components(x, 2)
    basis, mean, explained = principal_components(size * x, 2)
    assert explained.item() == pytest.approx(expected.item(), rel=1e-3)
    assert basis.isfinite().all() and mean.isfinite().all()


def test_new_vectors_of_any_leading_dimensions_use_the_same_basis(agrees):
    basis, mean, _ = principal_components(rows(40, 6), 3)
    for shape in [(2, 3, 5, 6), (6,), (0, 6), (2, 0, 6)]:
        x = torch.randn(shape).double()
        z = compress(x, basis, mean)
        assert z.shape == (*shape[:-1], 3)
        agrees(z, (x - mean) @ basis, "the formula", atol=1e-12)
        back = decompress(z, basis, mean)
        agrees(back, z @ basis.T + mean, "the formula", atol=1e-12)
        # Compressing again changes nothing: what can be kept is kept.
        torch.testing.assert_close(compress(back, basis, mean), z)


def test_gradients_are_those_of_a_linear_map(agrees_with_gradients):
    basis, mean, _ = principal_components(rows(40, 6), 3)
    x, z = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 3).double()
    linear = torch.nn.functional.linear
    agrees_with_gradients(
        compress,
        lambda x, basis, mean: linear(x, basis.T, -basis.T @ mean),
        *(x, basis, mean),
        against="F.linear",
        atol=1e-12,
    )
    agrees_with_gradients(
        decompress, linear, *(z, basis, mean), against="F.linear", atol=1e-12
    )


def test_no_gradient_flows_through_the_fit():
    x = rows(40, 6).requires_grad_()
    assert not any(t.requires_grad for t in principal_components(x, 3))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_half_inputs_have_a_basis_of_float32(low):
    x = rows(40, 6, low)
    found = principal_components(x, 3)
    assert {t.dtype for t in found} == {torch.float32}
    for ours, exact in zip(found, principal_components(x.double(), 3), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)
    basis, mean, _ = found
    z = compress(x, basis, mean)
    back = decompress(z, basis, mean)
    assert z.dtype == back.dtype == low
    # Rounded once, at the end: half a unit in the last of 8 bits, or of 11
    exact = (x.double() - mean) @ basis.double()
    half_a_unit = torch.finfo(low).eps / 2
    torch.testing.assert_close(z.double(), exact, rtol=half_a_unit, atol=1e-4)
    exact = z.double() @ basis.double().T + mean
    torch.testing.assert_close(back.double(), exact, rtol=half_a_unit, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "fitted"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64)],
)
def test_the_result_has_the_dtype_of_what_is_compressed(dtype, fitted):
    basis, mean, _ = principal_components(rows(40, 6, fitted), 3)
    x = rows(5, 6, dtype)
    z = compress(x, basis, mean)
    assert z.dtype == dtype and decompress(z, basis, mean).dtype == dtype
    exact = (x.double() - mean.double()) @ basis.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(z.double(), exact, atol=tolerance, rtol=tolerance)
    exact = z.double() @ basis.double().mT + mean.double()
    back = decompress(z, basis, mean).double()
    torch.testing.assert_close(back, exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, low):
    x = rows(40, 6, dtype)

    def everything():
        basis, mean, explained = principal_components(x, 3)
        z = compress(x, basis, mean)
        return basis, mean, explained, z, decompress(z, basis, mean)

    exact = everything()
    with torch.autocast("cpu", low):
        found = everything()
    assert all(map(torch.equal, found, exact))


def test_autocast_of_another_device_rounds_nothing_either():
    class NoFloat16(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert getattr(made, "dtype", None) != torch.float16
            return made

    # torch can imagine a tensor on a GPU of Apple's without having one.
    with FakeTensorMode(), torch.autocast("mps", torch.float16):
        x, basis, mean = (torch.empty(s, device="mps") for s in [(5, 6), (6, 3), (6,)])
        assert (x @ basis).dtype == torch.float16
        with NoFloat16():
            decompress(compress(x, basis, mean), basis, mean)


def test_many_rows_need_no_square_matrix_of_them():
    class NoneLargerThan(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            parts = made if isinstance(made, tuple | list) else [made]
            assert all(getattr(t, "nbytes", 0) <= 300 * 4 * 8 for t in parts)
            return made

    x = rows(300, 4)
    with NoneLargerThan():
        principal_components(x, 2)


def test_device_follows_the_input():
    basis, mean, explained = principal_components(torch.ones(9, 6, device="meta"), 3)
    assert basis.is_meta and mean.is_meta and explained.is_meta
    z = compress(torch.ones(4, 6, device="meta"), basis, mean)
    back = decompress(z, basis, mean)
    assert z.is_meta and back.is_meta and (z.shape, back.shape) == ((4, 3), (4, 6))


def test_non_contiguous_inputs_work_and_results_are_contiguous():
    x = rows(6, 40).mT
    basis, mean, explained = principal_components(x, 3)
    for found, expected in zip(
        (basis, mean, explained), principal_components(x.contiguous(), 3), strict=True
    ):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected)
    z = compress(x, basis, mean)
    torch.testing.assert_close(z, compress(x.contiguous(), basis, mean))
    back = decompress(z, basis, mean)
    other = decompress(z.mT.contiguous().mT, basis.mT.contiguous().mT, mean)
    assert z.is_contiguous() and back.is_contiguous() and other.is_contiguous()
    torch.testing.assert_close(other, back)


def test_inputs_are_not_modified():
    x = rows(40, 6)
    before = x.clone()
    basis, mean, _ = principal_components(x, 3)
    z = compress(x, basis, mean)
    copies = [t.clone() for t in (basis, mean, z)]
    decompress(z, basis, mean)
    assert torch.equal(x, before) and all(map(torch.equal, (basis, mean, z), copies))


def test_using_a_basis_compiles_to_one_graph(compiles):
    basis, mean, _ = principal_components(rows(40, 6), 3)

    def function(x):
        z = compress(x, basis, mean)
        return z, decompress(z, basis, mean)

    compiles(function, (rows(8, 6),), (rows(5, 6),))


def test_fitting_compiles_to_one_graph(compiles):
    compiles(lambda x: principal_components(x, 3), (rows(40, 6),), (rows(30, 6),))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_fitted_to_what_is_not_finite(value):
    x = rows(40, 6)
    x[3, 4] = value
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        principal_components(x, 3)
    basis, mean, _ = principal_components(rows(40, 6), 3)
    z = compress(x, basis, mean)
    assert not z[3].isfinite().any() and z[:3].isfinite().all()


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 6)])
def test_only_matrices_are_fitted(shape, refuses):
    with refuses(ValueError, f"x must be (N, D), got {shape}"):
        principal_components(torch.ones(shape), 1)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (5, 5)])
@pytest.mark.parametrize("k", [-1, 0, 6, 2.5, None])
def test_k_out_of_range_is_refused(k, shape, refuses):
    with refuses(ValueError, f"k must be from 1 to 5, got {k}"):
        principal_components(torch.ones(shape), k)
    assert principal_components(torch.ones(shape), 5)[0].shape == (shape[1], 5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_is_fitted_to_nothing(shape, refuses):
    with refuses(ValueError, "k must be from 1 to 0, got 1"):
        principal_components(torch.ones(shape), 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_not_float_is_refused(dtype, refuses):
    basis, mean = torch.eye(6)[:, :3], torch.zeros(6)
    with refuses(TypeError, f"x must be float, got {dtype}"):
        principal_components(torch.ones(9, 6, dtype=dtype), 3)
    with refuses(TypeError, f"x must be float, got {dtype}"):
        compress(torch.ones(9, 6, dtype=dtype), basis, mean)
    with refuses(TypeError, f"z must be float, got {dtype}"):
        decompress(torch.ones(9, 3, dtype=dtype), basis, mean)


@pytest.mark.parametrize(
    ("x", "basis", "mean"),
    [
        ((9, 5), (6, 3), (6,)),
        ((9, 1), (6, 3), (6,)),
        ((9, 3), (6, 3), (6,)),
        ((), (6, 3), (6,)),
        ((9, 6), (6, 3), (5,)),
        ((9, 6), (6, 3), (1,)),
        ((9, 6), (6, 3), ()),
        ((9, 6), (6, 3), (1, 6)),
        ((9, 6), (6,), (6,)),
        ((9, 6), (2, 6, 3), (6,)),
        ((9, 6), (2, 6, 3), (2,)),
    ],
)
def test_shapes_that_do_not_fit_a_basis_are_refused(x, basis, mean, refuses):
    shapes = f"got {x}, {basis} and {mean}"
    message = "x, basis and mean must be (..., D), (D, k) and (D,), " + shapes
    with refuses(ValueError, message):
        compress(torch.ones(x), torch.ones(basis), torch.ones(mean))


@pytest.mark.parametrize(
    ("z", "basis", "mean"),
    [
        ((9, 2), (6, 3), (6,)),
        ((9, 6), (6, 3), (6,)),
        ((9, 1), (6, 3), (6,)),
        ((), (6, 3), (6,)),
        ((9, 3), (6, 3), (3,)),
        ((9, 3), (6, 3), (1,)),
        ((9, 6), (6,), (6,)),
        ((9, 3), (2, 6, 3), (2,)),
    ],
)
def test_coordinates_that_do_not_fit_a_basis_are_refused(z, basis, mean, refuses):
    shapes = f"got {z}, {basis} and {mean}"
    message = "z, basis and mean must be (..., k), (D, k) and (D,), " + shapes
    with refuses(ValueError, message):
        decompress(torch.ones(z), torch.ones(basis), torch.ones(mean))
