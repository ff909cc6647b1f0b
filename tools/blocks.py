"""Find the fenced blocks of a page exactly as the site shows them.

The text goes through the site's own preprocessors: pymdownx's snippet preprocessor
expands the includes, its superfences scanner finds the fences. So the tests and the
site agree by construction on what a block is, whatever its info string, indent or
container. Each line of code remembers the file and line it was written on.

The comments that say what to do with a block are pytest-codeblocks' own, and its
parser reads them: it is given the page with every fence rewritten to the one form
that it understands.
"""

import functools
import hashlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown import Markdown
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.utils.meta import get_data
from pygments.lexers import get_lexer_by_name
from pygments.lexers.python import Python2Lexer, PythonLexer
from pygments.util import ClassNotFound
from pymdownx.snippets import SnippetPreprocessor
from pymdownx.superfences import SuperFencesBlockPreprocessor
from pytest_codeblocks.main import extract_from_buffer

Origin = tuple[str, int]  # file relative to the root, line counted from 1


@dataclass
class Fence:
    language: str
    options: dict
    code: str
    origins: list[Origin]  # one for each line of code
    start: int  # of the opening line, in the expanded page
    end: int  # one past the closing line
    opening: Origin


@dataclass
class Block:
    """A fence that runs, with what its page says about it."""

    fence: Fence
    code: str
    shown: Fence | None = None  # the output that the page shows under it
    importorskip: str | None = None
    marks: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest(self.code)


def digest(code: str) -> str:
    """The name of a block in the ledger: its text as a reader sees it."""
    return hashlib.sha256(code.strip("\n").encode()).hexdigest()[:16]


@functools.cache
def is_python(language: str | None) -> bool:
    try:
        lexer = get_lexer_by_name(language or "")
    except ClassNotFound:
        return False
    return isinstance(lexer, (PythonLexer, Python2Lexer))


class Line(str):
    """A line of text that knows where it was written."""

    origin: Origin

    def __new__(cls, text: str, origin: Origin):
        line = super().__new__(cls, text)
        line.origin = origin
        return line

    def __radd__(self, indent: str):  # the preprocessor indents included lines
        return Line(str.__add__(indent, self), self.origin)


class _Includes(SnippetPreprocessor):
    """pymdownx's preprocessor, with origins kept.

    What it overrides, here and below, is documented nowhere: the canaries of the tests
    plant a fault in every shape that a block can have.
    """

    @classmethod
    def like(cls, other: SnippetPreprocessor) -> "_Includes":
        made = cls.__new__(cls)
        made.__dict__ = {**other.__dict__, "seen": set()}
        return made

    def read_lines(self, path):
        name = Path(path).resolve().relative_to(Path(self.base_path[0]).resolve())
        lines = super().read_lines(path)
        return [Line(text, (name.as_posix(), n)) for n, text in enumerate(lines, 1)]

    def dedent(self, lines):
        dedented = super().dedent(lines)
        return [Line(t, line.origin) for t, line in zip(dedented, lines, strict=True)]


class _Fences(SuperFencesBlockPreprocessor):
    """pymdownx's scanner, which notes the fences instead of rendering them."""

    def run(self, lines):
        self.found: list[Fence] = []
        super().run(lines)
        return self.found

    def process_nested_block(self, ws, content, start, end):
        self.found.append(
            Fence(
                language=self.lang or "",
                options=dict(self.options),
                code=self.rebuild_block(self.code) + "\n",
                origins=[],
                start=start,
                end=end,
                opening=("", 0),
            )
        )
        self.clear()


class Scanner:
    """Finds the blocks of pages under one MkDocs configuration."""

    def __init__(self, config: MkDocsConfig):
        self.root = Path(config.config_file_path).resolve().parent
        self.markdown = Markdown(
            extensions=config["markdown_extensions"],
            extension_configs=config["mdx_configs"],
        )

    @classmethod
    @functools.cache
    def of(cls, config_file: Path) -> "Scanner":
        return cls(load_config(str(config_file)))

    def expand(self, page: Path) -> tuple[list[str], list[Origin]]:
        """The page's lines with includes resolved, and where each was written."""
        source = page.read_text(encoding="utf-8-sig")
        text, _ = get_data(source)
        skipped = source[: source.rindex(text)].count("\n") if text else 0
        name = page.resolve().relative_to(self.root).as_posix()
        lines = [
            Line(line, (name, n))
            for n, line in enumerate(text.split("\n"), 1 + skipped)
        ]
        site = self.markdown.preprocessors["snippet"]
        includes = _Includes.like(site)
        lines = includes.parse_snippets(lines)
        last = (name, 0)
        origins = [last := getattr(line, "origin", last) for line in lines]
        normalize = self.markdown.preprocessors["normalize_whitespace"]
        return normalize.run(lines), [*origins, last, last]

    def fences(self, page: Path) -> tuple[list[str], list[Fence]]:
        lines, origins = self.expand(page)
        self.markdown.reset()
        site = self.markdown.preprocessors["fenced_code_block"]
        scanner = _Fences(self.markdown)
        scanner.config, scanner.extension = site.config, site.extension
        found = scanner.run(list(lines))
        for fence in found:
            fence.origins = origins[fence.start + 1 : fence.end - 1]
            fence.opening = origins[fence.start]
        return lines, found

    def blocks(self, page: Path) -> list[Block]:
        """The blocks of the page that run, in order: Python, and figures."""
        lines, fences = self.fences(page)
        plain: list[str] = []  # the page as pytest-codeblocks can read it
        written: dict[int, Fence] = {}  # by the line of `plain` that opens it
        position = 0
        for fence in fences:
            plain += _comments(lines[position : fence.start])
            position = fence.end
            written[len(plain) + 1] = fence
            plain += [_TICKS + fence.language, *fence.code.split("\n")[:-1], _TICKS]
        plain += _comments(lines[position:])
        parsed = extract_from_buffer(io.StringIO("\n".join(plain) + "\n"), 10**9)
        by_line = {block.lineno: block for block in parsed}
        blocks: list[Block] = []
        for line, fence in written.items():
            block = by_line.get(line)
            if block is None:  # the parser took it as the output of the one before
                blocks[-1].shown = fence
            elif runs(fence.language):
                if block.expected_output_ignore_whitespace:
                    raise PageError(fence, "an output is compared with its spaces")
                made = Block(fence, fence.code, None, block.importorskip, block.marks)
                blocks.append(made)
            elif block.expected_output is not None:
                raise PageError(
                    fence, "an output is shown under a block that is not run"
                )
        return blocks


def runs(language: str) -> bool:
    return language in FIGURES or is_python(language)


# Fences that draw, and the module that knows how.
FIGURES = {"figure": "tools.figures", "live": "tools.live"}


def _comments(lines: list[str]) -> list[str]:
    """The authors' comments to the runner; all else blank, so that lines count."""
    if any(_CONT.match(line) for line in lines):
        raise ValueError("a page is one program: `cont` has no place in it")
    return [line.strip() if _COMMENT.match(line) else "" for line in lines]


class PageError(ValueError):
    def __init__(self, fence: Fence, message: str):
        super().__init__(f"{fence.opening[0]}:{fence.opening[1]}: {message}")


_TICKS = "`" * 24
_COMMENT = re.compile(r"\s*<!--[-\s]*pytest(-codeblocks:|\.mark\.).*-->\s*$")
_CONT = re.compile(r"\s*<!--[-\s]*pytest-codeblocks:\s*cont\W")
