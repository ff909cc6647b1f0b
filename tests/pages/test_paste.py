"""A page pasted block by block into an empty Python with torch gives what it shows.

Its notebook has just these blocks as its cells (test_takeaway.py), so it runs as well.
"""

from collections import defaultdict

import pytest

from tools import alone, sources
from tools.blocks import Scanner, is_python

from .conftest import ROOT, SHORT


def blocks_of(page):
    blocks = Scanner.of(ROOT / "mkdocs.yml").blocks(ROOT / page)
    return [block for block in blocks if is_python(block.fence.language)]


@pytest.fixture(scope="module")
def pasted():
    by_needs = defaultdict(dict)
    for page in SHORT:
        needs = sources.head(ROOT / page).get("needs", [])
        by_needs[tuple(needs)][page] = [block.code for block in blocks_of(page)]
    results = {}
    for needs, programs in by_needs.items():
        results |= alone.run(programs, needs)
    return results


@pytest.mark.parametrize("page", SHORT)
def test_a_reader_who_pastes_the_page_sees_what_it_shows(page, pasted):
    result = pasted[page]
    assert result["error"] is None, result["error"]
    for block, printed in zip(blocks_of(page), result["printed"], strict=True):
        shown = block.shown.code if block.shown else ""
        assert printed == shown


def test_nothing_but_torch_can_be_imported():
    names = ["snippets", "tools", "numpy", "pytest", "sklearn"]
    results = alone.run({name: [f"import {name}"] for name in names})
    for name in names:
        assert f"No module named '{name}'" in results[name]["error"]


def test_what_a_page_says_it_needs_can_be_imported():
    code = "import sklearn, torch\nprint(torch.ones(1).numpy().sum())"
    results = alone.run({"page": [code]}, needs=("scikit-learn",))
    assert results["page"] == {"printed": ["1.0\n"], "error": None}


def test_a_page_starts_in_an_empty_folder_with_another_seed_than_the_tests():
    listing = "import os\nprint(os.listdir())"
    draw = "import torch\nprint(torch.rand(()).item())"
    seeded = "import torch\ntorch.manual_seed(0)\nprint(torch.rand(()).item())"
    results = alone.run({"p": [listing, draw], "seeded": [listing, seeded]})
    assert results["p"]["printed"][0] == "[]\n"
    assert results["p"]["printed"][1] != results["seeded"]["printed"][1]
