"""TITLE against torch's own; what characterises it; what it refuses."""

import pytest
import torch

from snippets.CHAPTER.NAME import NAME


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(2, 5, 8), (8,), (0, 8)])
def test_values_and_gradients_are_those_of_torch(
    shape, dtype, atol, agrees_with_gradients
):
    x = torch.randn(shape, dtype=dtype)
    agrees_with_gradients(NAME, torch.square, x, against="torch.square", atol=atol)


def test_the_sign_of_the_input_does_not_matter():
    x = torch.randn(8)
    assert torch.equal(NAME(-x), NAME(x))


def test_integers_are_refused(refuses):
    with refuses(TypeError, "x must be floating point, got torch.int64"):
        NAME(torch.tensor([1, 2]))
