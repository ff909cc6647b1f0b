"""A page pasted block by block into an empty Python with torch gives what it shows.

Its notebook has just these blocks as its cells (test_notebooks.py), so it runs as well.
"""

import pytest

from tools import sources
from tools.blocks import Scanner, is_python

from .conftest import ROOT, SHORT


def blocks_of(page):
    blocks = Scanner.of(ROOT / "mkdocs.yml").blocks(ROOT / page)
    return [block for block in blocks if is_python(block.fence.language)]


# Under xdist each of these tests goes where there is time for it (conftest.py).
@pytest.mark.parametrize("page", SHORT)
def test_a_reader_who_pastes_the_page_sees_what_it_shows(page, isolated):
    blocks = blocks_of(page)
    needs = sources.head(ROOT / page).get("needs", [])
    result = isolated([block.code for block in blocks], needs)
    assert result["error"] is None, result["error"]
    assert result["stderr"] == ""
    for block, printed in zip(blocks, result["printed"], strict=True):
        shown = block.shown.code if block.shown else ""
        assert printed == shown


@pytest.mark.parametrize("name", ["snippets", "tools", "numpy", "pytest", "sklearn"])
def test_nothing_but_torch_can_be_imported(name, isolated):
    assert f"No module named '{name}'" in isolated([f"import {name}"])["error"]


def test_what_a_page_says_it_needs_can_be_imported(isolated):
    code = "import sklearn, torch\nprint(torch.ones(1).numpy().sum())"
    result = isolated([code], needs=["scikit-learn"])
    assert (result["printed"], result["error"]) == (["1.0\n"], None)


def test_a_page_starts_in_an_empty_folder_with_another_seed_than_the_tests(isolated):
    listing = "import os\nprint(os.listdir())"
    draw = "import torch\nprint(torch.rand(()).item())"
    seeded = "import torch\ntorch.manual_seed(0)\nprint(torch.rand(()).item())"
    empty, drawn = isolated([listing, draw])["printed"]
    assert empty == "[]\n"
    assert drawn != isolated([seeded])["printed"][0]


@pytest.mark.parametrize(
    "code, key, seen",
    [
        ("import torch\ntorch.set_default_dtype(torch.float64)", "changed", "dtype"),
        ("open('a.txt', 'w').close()", "left", "a.txt"),
        ("import warnings\nwarnings.warn('careful')", "stderr", "careful"),
        ("import os\nos.write(1, b'from C')", "stderr", "from C"),
        ("import os\nos.abort()", "error", "it died"),
        ("raise SystemExit('no more')", "error", "no more"),
    ],
)
def test_nothing_that_code_does_goes_unseen_or_outlasts_it(code, key, seen, isolated):
    assert seen in isolated([code])[key]
    after = isolated(["print('still here')"])
    assert after.pop("printed") == ["still here\n"]
    assert not any(after.values())
