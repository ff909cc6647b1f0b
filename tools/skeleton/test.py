"""Ours against somebody else's."""

import pytest
import torch

from snippets.chapter.double import double


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3,), (1,), (0, 4)], ids=str)
def test_values_and_gradients_are_those_of_torch(shape, dtype, agrees_with_gradients):
    x = torch.randn(shape, dtype=dtype)

    def torchs(x):
        return torch.mul(x, 2)

    agrees_with_gradients(double, torchs, x, against="torch.mul", atol=0)


def test_twice_nothing_is_nothing():
    assert double(torch.zeros(3)).eq(0).all()


def test_it_compiles(compiles):
    compiles(double, (torch.randn(3),), (torch.randn(4),))


def test_whole_numbers_are_refused(refuses):
    with refuses(ValueError, "x must be floating point, got torch.int64"):
        double(torch.tensor([1]))
