"""What a reader takes along is the page: all of it, and as it was tested."""

import re
import shutil

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tools import notebooks, sources
from tools.blocks import Scanner, is_python

from .conftest import CONCEPTS, ROOT, SHORT

CONFIG = load_config(str(ROOT / "mkdocs.yml"))
every_concept = pytest.mark.parametrize("page", CONCEPTS)
# What a lab gives is tested in test_labs.py.
every_page = pytest.mark.parametrize("page", [p for p in CONCEPTS if p in SHORT])


def name_of(page: str) -> str:
    return page.removeprefix("docs/").rpartition(".")[0]


@every_concept
def test_the_stored_notebook_is_the_page(page):
    made = notebooks.Cells(ROOT / page, CONFIG)
    stored = sources.notebook(ROOT / page)
    assert stored.read_text(encoding="utf-8") == made.notebook(), "make outputs"


@every_page
def test_the_script_is_python_with_the_text_as_comments(page):
    script = notebooks.Cells(ROOT / page, CONFIG).script()
    blocks = Scanner.of(ROOT / "mkdocs.yml").blocks(ROOT / page)
    code = [b.code.rstrip("\n") for b in blocks if is_python(b.fence.language)]
    assert script.count("\n# %%\n") == len(code)
    assert all(block in script for block in code)
    compile(script, page, "exec")


def test_no_notebook_is_left_of_a_page_that_is_gone():
    stored = sorted((ROOT / "notebooks").rglob("*.ipynb"))
    names = [path.relative_to(ROOT / "notebooks").as_posix() for path in stored]
    pages = [f"{name_of(page)}.ipynb" for page in CONCEPTS]
    assert names == pages


@every_page
def test_a_notebook_is_valid_and_has_every_block_and_output(page):
    made = notebooks.Cells(ROOT / page, CONFIG)
    notebook = nbformat.reads(made.notebook(), as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    blocks = Scanner.of(ROOT / "mkdocs.yml").blocks(ROOT / page)
    blocks = [block for block in blocks if is_python(block.fence.language)]
    assert [cell.source for cell in code] == [b.code.rstrip("\n") for b in blocks]
    shown = [b.shown.code if b.shown else "" for b in blocks]
    stored = ["".join(out.text for out in cell.outputs) for cell in code]
    assert stored == shown


@every_page
def test_the_text_is_plain_markdown_and_complete(page):
    text = notebooks.Cells(ROOT / page, CONFIG).markdown()
    for leftover in ("--8<--", "///", "???", "pytest-codeblocks", ".md)", "[NOTES]"):
        assert leftover not in text
    source = (ROOT / page).read_text(encoding="utf-8")
    claims = source.count("/// claim")
    assert len(re.findall(r"^- “.*” \*\*.*\*\* \(C\d+\): ", text, re.M)) == claims
    for heading in [line for line in source.split("\n") if line.startswith("#")]:
        assert heading in text


@pytest.fixture
def house(tmp_path):
    """A copy of the site's settings with one page of its own."""
    for name in ("mkdocs.yml", "notes.md", "tools", "snippets", "docs/claims.yml"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
    return tmp_path


def page_with(house, text):
    page = house / "docs/page.md"
    page.write_text(text, encoding="utf-8")
    config = load_config(str(house / "mkdocs.yml"))
    return notebooks.Cells(page, config)


@pytest.mark.parametrize("line", ["!pip install x", "%cd /", "%%bash"])
def test_what_a_notebook_would_run_as_a_command_is_refused(house, line):
    with pytest.raises(ValueError, match="a notebook would run"):
        page_with(house, f"# P\n\n```python\nx = 1\n{line}\n```\n")


def test_shell_commands_are_text(house):
    made = page_with(house, "# P\n\n```sh\nrm -rf /\n```\n")
    assert [kind for kind, _ in made.pieces] == ["text", "text"]


def test_links_lead_to_the_site_and_figures_are_told(house):
    made = page_with(
        house,
        "# P\n\nSee [this](chapter/a-b.md#here) and [that](index.md).\n\n"
        '```figure name="x" alt="Two lines."\npass\n```\n',
    )
    url = CONFIG.site_url
    assert f"[this]({url}chapter/a-b/#here) and [that]({url})" in made.markdown()
    assert "Two lines." in made.markdown() and "pass" not in made.markdown()


def test_colab_opens_the_repositorys_own_file():
    assert notebooks.colab(CONFIG, "attention/dot-product") == (
        "https://colab.research.google.com/github/"
        "notes-that-run/notes-that-run/blob/main/notebooks/attention/dot-product.ipynb"
    )


def test_the_site_has_them_all(tmp_path):
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    index = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    everything = (tmp_path / "llms-full.txt").read_text(encoding="utf-8")
    assert index.startswith(f"# {CONFIG.site_name}\n\n> ")
    for page in CONCEPTS:
        name = name_of(page)
        assert f"]({CONFIG.site_url}{name}.md): " in index
        markdown = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert everything.count(markdown) == 1
        notebook = (tmp_path / f"{name}.ipynb").read_bytes()
        assert notebook == (ROOT / f"notebooks/{name}.ipynb").read_bytes()
