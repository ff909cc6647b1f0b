"""What the tests of attention share: snippets compile as torch's own code does."""

import os

import pytest
import torch


@pytest.fixture(params=["eager", "aot_eager"])
def compiles(request):
    """Compiles a function to one whole graph, which must return what it returns."""
    if "MUTANT_UNDER_TEST" in os.environ:
        pytest.skip("a mutant is chosen by an environment variable: no graph has that")

    def check(function, *inputs):
        torch._dynamo.reset()
        whole = torch.compile(function, fullgraph=True, backend=request.param)
        torch.testing.assert_close(whole(*inputs), function(*inputs))

    return check
