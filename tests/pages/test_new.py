"""A concept begins as a sound skeleton."""

import shutil

import pytest
import torch.distributed.tensor  # noqa: F401  assert_close's; it can't be loaded twice

from tools import new

from .conftest import ROOT


def test_what_a_concept_begins_with_is_green_and_passes_the_gate(house):
    config = (house.root / "mkdocs.yml").read_text(encoding="utf-8")
    nav = "nav:\n  - index.md\n  - Labs:\n      - labs.md\n"
    house.write("mkdocs.yml", nav + config)
    house.write("docs/labs.md", "# Labs\n")
    shutil.copy(ROOT / "tests/conftest.py", house.root / "conftest.py")
    made = new.begin("my-chapter/my-idea", house.root)
    new.begin("my-chapter/other", house.root)
    assert made == [
        "docs/my-chapter/my-idea.md",
        "snippets/my_chapter/my_idea.py",
        "tests/my_chapter/test_my_idea.py",
        "mkdocs.yml",
    ]
    nav = (house.root / "mkdocs.yml").read_text(encoding="utf-8")
    assert (
        "  - My chapter:\n      - my-chapter/my-idea.md\n      - my-chapter/other.md\n"
        "  - Labs:\n" in nav
    )
    assert house.test("--write-outputs").ret == 0  # draws
    assert house.test().ret == 0
    theme = ("no stamp of a run", "its place among", "can't be downloaded")  # not here
    faults = house.gate().split("\n")
    assert [f for f in faults if not any(part in f for part in theme)] == []
    assert house.pytester.runpytest_subprocess("tests", "-k", "not compiles").ret == 0
    with pytest.raises(FileExistsError, match=r"my-idea\.md is there already"):
        new.begin("my-chapter/my-idea", house.root)
