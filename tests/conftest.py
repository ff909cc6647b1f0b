"""What the tests share: a fixed seed, comparisons, what may be missing."""

import contextlib
import functools
import importlib
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    # With more threads, forked mutation tests hang and parallel test runs crawl.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def agrees(request):
    """agrees(ours, reference, against, atol, rtol) compares two tensors and notes it.

    The note (against what, in which dtype, how far off) goes into the report of the
    test: the site's stamps are made of it.
    """

    def check(ours, reference, against, atol, rtol=0):
        assert ours.shape == reference.shape
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, atol=atol, rtol=rtol)
        # Relative to the largest value, where that is above 1.
        expected = reference.detach().double()
        difference = (ours.detach().double() - expected).abs()
        if expected.numel():
            difference /= expected.abs().max().clamp(min=1)
        note = {
            "against": against,
            "dtype": str(ours.dtype).removeprefix("torch."),
            "difference": difference.max().item() if difference.numel() else 0.0,
        }
        request.node.user_properties.append(("compared", note))

    return check


@pytest.fixture
def agrees_with_gradients(agrees):
    """Compares what two callables return, and all gradients of it.

    Both get the same inputs, and the gradient arriving at each output is the same
    random one. Modules given as `modules` must have parameters of the same names.
    """

    def outputs_and_gradients(function, inputs, module, arriving):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names, parameters = [], []
        if module is not None:
            names, parameters = zip(*sorted(module.named_parameters()), strict=True)
        if not arriving:
            arriving.extend(torch.randn_like(x) for x in outputs)
        gradients = torch.autograd.grad(
            outputs, [*inputs, *parameters], arriving, materialize_grads=True
        )
        return names, [*outputs, *gradients]

    def check(ours, reference, *inputs, against, atol, rtol=0, modules=(None, None)):
        arriving = []
        names, found = outputs_and_gradients(ours, inputs, modules[0], arriving)
        expected_names, expected = outputs_and_gradients(
            reference, inputs, modules[1], arriving
        )
        assert names == expected_names
        for x, y in zip(found, expected, strict=True):
            agrees(x, y, against, atol, rtol)

    return check


@pytest.fixture
def randomize():
    """Fills every parameter with noise: many start at 0 or 1, which hides mistakes."""

    def fill(module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.5)
        return module

    return fill


@pytest.fixture
def refuses():
    """with refuses(ValueError, message): the block must fail with just this message."""

    def expect(error, message):
        return pytest.raises(error, match=f"^{re.escape(message)}$")

    return expect


@pytest.fixture(params=["eager", "aot_eager"])
def compiles(request):
    """compiles(function, *calls): one graph must return what the function returns.

    Each call is a tuple of arguments; they differ in size, as a last batch does.
    """
    if "MUTANT_UNDER_TEST" in os.environ:
        pytest.skip("mutants are chosen by an environment variable: no graph has that")

    def check(function, *calls):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend=request.param)
        for arguments in calls:
            torch.manual_seed(1)
            found = compiled(*arguments)
            torch.manual_seed(1)
            expected = function(*arguments)
            torch.testing.assert_close(found, expected, check_stride=True)

    return check


@pytest.fixture(scope="session")
def isolated():
    """isolated(blocks, needs, files): what a program does where only torch is.

    See tools/isolated.py, which mutation testing doesn't have: it copies no tools.
    """
    from tools.isolated import Interpreter

    with contextlib.ExitStack() as stack:
        started = {}  # importing torch takes a second: once for each set of needs

        def run(blocks, needs=(), files=None):
            if (key := tuple(needs)) not in started:
                started[key] = stack.enter_context(Interpreter(key))
            return started[key].run(blocks, files)

        yield run


def leave_out(reason: str):
    """What is missing is left out here, and fails where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def reference_library():
    """reference_library("package.module") imports it, or the test is left out."""

    def load(name):
        package = name.partition(".")[0]
        if find_spec(package) is None:
            leave_out(f"{package} is not installed: make reference")
        return importlib.import_module(name)

    return load


# Of a browser that starts no service of its own.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where Chromium is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, names)), ""
    )
    if not found or not Path(found).exists():
        leave_out("no Chromium for the browser tests: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def launch(chromium):
    """launch(*flags) starts a browser; a process can have one Playwright, this one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        start = functools.partial(playwright.chromium.launch, executable_path=chromium)
        yield lambda *flags: start(args=[*FLAGS, *flags])
