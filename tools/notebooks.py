"""Each page as a notebook, a script and plain Markdown, for a reader to take along.

All are made from the page's expanded text, so that includes are resolved and what
belongs to this site (claims, figures, folded solutions) becomes ordinary Markdown. The
notebooks are stored in notebooks/, so that they can be opened from the repository;
the tests compare them with their pages and run them. `make outputs` stores them.
"""

import json
import posixpath
import re
import shutil
from pathlib import Path
from urllib.parse import urljoin

import nbformat

from tools import claims, generated, labs, sources
from tools.blocks import FIGURES, Scanner, is_python

SEPARATOR = "\n---\n\n"
_CLAIM = re.compile(r"/// claim \| (C\d+)\n((?: {4}[^\n]*\n)*)\n?(.*?)\n///", re.S)
_FOLD = re.compile(r'^[?!]{3}\+? \w+ "(.*)"$', re.M)
_COMMENT = re.compile(r"^\s*<!--[-\s]*pytest.*-->\s*$\n?", re.M)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)\.(?:md|py)(#[^)\s]*)?\)")


class Cells:
    """A page as cells: text, code and outputs."""

    def __init__(self, page: Path, config, cells: list | None = None):
        self.page, self.config = page, config
        self.name = sources.name(page)
        self.meta = sources.head(page)
        self.url = urljoin(config.site_url, sources.address(self.name))
        self.pieces: list[tuple[str, str]] = []
        self.ran: dict = {}  # a lab's last run
        if sources.is_lab(page):
            self.ran = labs.ran(page)
            for cell in cells or labs.kept(page):
                self.cell(cell)
            return
        lines, fences = Scanner.of(Path(config.config_file_path)).fences(page)
        position = 0
        for fence in fences:
            self.text("\n".join(lines[position : fence.start]))
            self.fence(fence)
            position = fence.end
        self.text("\n".join(lines[position:]))

    def cell(self, cell) -> None:
        """A cell of a lab: its snippets' text instead of their imports."""
        if cell.cell_type != "code":
            return self.text(cell.source)
        self.pieces.append(("code", labs.inlined(cell.source)))
        if printed := labs.printed(cell):
            self.pieces.append(("output", printed.rstrip("\n")))
        if alt := cell.metadata.get("alt"):
            self.pieces.append(
                ("text", f"*What it draws, on [the page]({self.url}): {alt}*")
            )

    def text(self, text: str) -> None:
        text = _COMMENT.sub("", text)
        # No text is code by its indent here: it belongs to a list or a fold.
        text = re.sub(r"^ +", "", _CLAIM.sub(self.claim, text), flags=re.M)
        text = _FOLD.sub(r"**\1**", text)
        text = _LINK.sub(self.link, text)
        text = generated.plain(text)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        if text:
            self.pieces.append(("text", text))

    def fence(self, fence) -> None:
        code = fence.code.rstrip("\n")
        if fence.language in FIGURES:
            says = fence.options.get("alt") or fence.options.get("caption")
            where = "A figure" if fence.language == "figure" else "A live figure"
            self.pieces.append(
                ("text", f"*{where}, on [the page]({self.url}): {says}*")
            )
        elif is_python(fence.language):
            if magic := re.search(r"^[!%].*", code, re.M):
                raise ValueError(f"{self.page}: a notebook would run {magic[0]!r}")
            self.pieces.append(("code", code))
        elif self.pieces and self.pieces[-1][0] == "code":
            self.pieces.append(("output", code))
        else:
            self.pieces.append(("text", f"```{fence.language}\n{code}\n```"))

    def claim(self, match: re.Match) -> str:
        name, options, text = match.groups()
        verdict = re.search(r"verdict: (.*)", options)[1]
        says = claims.quotation(claims.claims()[name])
        word = f"{claims.SIGNS.get(verdict, '')} {verdict}".strip()
        return f"- “{says}” **{word}** ({name}): {text}"

    def link(self, match: re.Match) -> str:
        here = posixpath.join(posixpath.dirname(self.name), match[1])
        folder = sources.address(posixpath.normpath(here))
        return f"]({urljoin(self.config.site_url, folder)}{match[2] or ''})"

    def markdown(self) -> str:
        """The page in plain Markdown."""
        kinds = {
            "text": "{}",
            "code": "```python\n{}\n```",
            "output": "```text\n{}\n```",
        }
        body = [kinds[kind].replace("{}", text) for kind, text in self.pieces]
        return "\n\n".join([*body, f"Source: {self.url}"]) + "\n"

    def script(self) -> str:
        """The page as a Python file, its text in comments (percent format)."""
        cells = []
        for kind, text in self.pieces:
            if kind == "code":
                cells.append(f"# %%\n{text}")
            elif kind == "text":
                lines = [f"# {line}".rstrip() for line in text.split("\n")]
                cells.append("\n".join(["# %% [markdown]", *lines]))
        return "\n\n".join(cells) + "\n"

    def notebook(self) -> str:
        """The page as a notebook: what its cells print is stored with them."""
        made = nbformat.v4.new_notebook(
            metadata={
                "kernelspec": {
                    "display_name": "Python 3",
                    "language": "python",
                    "name": "python3",
                },
                "language_info": {"name": "python"},
                **({"ran": self.ran} if self.ran else {}),
            }
        )
        about = f"From [{self.config.site_name}]({self.url}). {self.config.copyright}."
        for kind, text in [*self.pieces, ("text", about)]:
            if kind == "text":
                made.cells.append(nbformat.v4.new_markdown_cell(text))
            elif kind == "code":
                made.cells.append(nbformat.v4.new_code_cell(text))
            else:
                stream = nbformat.v4.new_output(
                    "stream", name="stdout", text=text + "\n"
                )
                made.cells[-1].outputs.append(stream)
        for n, cell in enumerate(made.cells):
            cell.id = f"cell-{n}"  # the same every time
        return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def colab(config, name: str) -> str:
    """Where Colab opens a page's notebook, from the repository."""
    repository = config.repo_url.removeprefix("https://github.com/").rstrip("/")
    return (
        f"https://colab.research.google.com/github/{repository}"
        f"/blob/main/notebooks/{name}.ipynb"
    )


def store(made: Cells) -> None:
    """Write a page's notebook where the repository keeps it."""
    path = sources.notebook(made.page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.notebook(), encoding="utf-8")


def publish(pages: list, config) -> None:
    """Put the notebooks, the Markdown and the files for language models in the site."""
    site = Path(config.site_dir)
    sections: dict[str, list[str]] = {}
    everything = []
    for page in pages:
        made = Cells(Path(page.file.abs_src_path), config)
        target = site / f"{made.name}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(made.markdown(), encoding="utf-8")
        stored = sources.notebook(made.page)  # the tests hold it against the page
        if stored.exists():
            shutil.copy(stored, target.with_suffix(".ipynb"))
            target.with_suffix(".py").write_text(made.script(), encoding="utf-8")
        section = page.parent.title if page.parent else "Overview"
        url = urljoin(config.site_url, f"{made.name}.md")
        line = f"- [{page.title}]({url}): {made.meta['description']}"
        sections.setdefault(section, []).append(line)
        everything.append(made.markdown())
    index = [
        f"# {config.site_name}",
        f"> {config.site_description}",
        f"All pages in one file: {urljoin(config.site_url, 'llms-full.txt')}",
    ]
    for section, lines in sections.items():
        index += [f"## {section}", "\n".join(lines)]
    (site / "llms.txt").write_text("\n\n".join(index) + "\n", encoding="utf-8")
    (site / "llms-full.txt").write_text(SEPARATOR.join(everything), encoding="utf-8")
