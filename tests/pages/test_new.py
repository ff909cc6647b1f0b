"""`make new`: what it writes runs, and is red only where its author has to write."""

import re
import shutil

import pytest
import torch.distributed.tensor  # noqa: F401
import yaml
from bs4 import BeautifulSoup

from tools import anatomy, new

from .conftest import CONFIG, ROOT

# assert_close imports torch.distributed.tensor, which can't be done twice, and pytester
# forgets the modules that its runs import: so it is imported first.

CLAIMS = """
claims:
  - {id: C01, page: chapter/two-words, says: Squares are positive.}
no_claims: []
"""


@pytest.fixture
def started(house):
    """A house in which chapter/two-words was started."""
    house.write("notes.md", "Squares are positive.\n")
    house.write("docs/claims.yml", CLAIMS)
    house.write("docs/labs.md", "# Labs\n")
    config = (house.root / "mkdocs.yml").read_text()
    nav = "nav:\n  - Home: index.md\n  - Labs: labs.md\n"
    house.write("mkdocs.yml", nav + config)
    made = new.write("chapter/two-words", house.root)
    assert all(path.exists() for path in made)
    return house


def test_its_blocks_run_and_show_what_they_print(started):
    started.test().assert_outcomes(passed=4)


def test_its_tests_run(started):
    shutil.copy(ROOT / "tests/conftest.py", started.root / "tests")
    started.pytester.syspathinsert(started.root)
    started.test("--import-mode=importlib", what="tests").assert_outcomes(passed=8)


def test_its_page_is_red_for_what_is_left_to_write(started):
    started.test().assert_outcomes(passed=4)
    started.build()  # in the nav: the build is strict
    built = started.site / "chapter/two-words/index.html"
    html = BeautifulSoup(built.read_text(encoding="utf-8"), "html.parser")
    assert anatomy.check(html, "chapter/two-words", True, started.root) == [
        "claim C01 is not judged",
        'no figure opens it: one has lead="yes"',
    ]
    # What our theme adds is not in this house.
    theme = "no stamp|its place among|can't be downloaded"
    faults = [line for line in started.gate().split("\n") if not re.search(theme, line)]
    assert len(faults) == 2


def test_nothing_is_overwritten(started):
    before = {p: p.read_bytes() for p in started.root.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"^docs/chapter/two-words.md is there"):
        new.write("chapter/two-words", started.root)
    (started.root / "docs/chapter/two-words.md").unlink()
    with pytest.raises(FileExistsError, match=r"^snippets/chapter/two_words.py is"):
        new.write("chapter/two-words", started.root)
    del before[started.root / "docs/chapter/two-words.md"]
    after = {p: p.read_bytes() for p in started.root.rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "page", ["", "name", "Chapter/name", "a/b/c", "a/../b", "a/1b"]
)
def test_a_name_that_can_be_none_is_refused(page, tmp_path):
    with pytest.raises(ValueError, match=f"got {page!r}"):
        new.write(page, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "page, chapter", [("attention/new-one", "Attention"), ("far-off/new", "Far off")]
)
def test_it_comes_last_in_its_chapter_and_all_else_stays(page, chapter):
    def nav(config):
        start, end = config.index("nav:"), config.index("exclude_docs:")
        entries = yaml.safe_load(config[start:end])["nav"]
        return {name: at for entry in entries for name, at in entry.items()}

    before, after = nav(CONFIG), nav(new.listed(CONFIG, page))
    assert after.pop(chapter) == [*before.pop(chapter, []), f"{page}.md"]
    assert after == before
    assert list(nav(new.listed(CONFIG, page)))[-2:] == list(nav(CONFIG))[-2:]
