"""A pytest plugin: every block of every page is a test.

It builds on pytest-codeblocks, whose comments say what to do with a block, and makes
up for what that lacks: see blocks.py for what a block is and program.py for how a page
runs. `--write-outputs` rewrites the shown outputs and figures instead of comparing.
recorder.py keeps what it finds.
"""

import importlib
import re

import pytest

# Private: pytest rewrites the assertions of modules that it imports, and of no other
# code. Without it an assertion of a page would fail without saying what was compared.
from _pytest.assertion.rewrite import rewrite_asserts
from pytest_codeblocks import plugin as codeblocks

from tools import figures, ledger, outputs, sources
from tools.blocks import FIGURES, Block, Scanner, digest
from tools.program import Program

TIME_LIMIT = 30  # seconds a block; a page may ask for another in its front matter


def pytest_addoption(parser):
    parser.addoption(
        "--write-outputs",
        action="store_true",
        help="rewrite the outputs and figures that the pages show",
    )


def pytest_configure(config):
    if config.option.write_outputs and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--write-outputs runs in one process: leave out -n")


def pytest_collect_file(file_path, parent):
    docs = parent.config.rootpath / "docs"
    if file_path.suffix != ".md" or docs not in file_path.parents:
        return None
    return Page.from_parent(parent, path=file_path)


class Page(codeblocks.MarkdownFile):
    """A page of the site: one program."""

    def collect(self):
        root = self.config.rootpath
        self.page = self.path.relative_to(root).as_posix()
        blocks = Scanner.of(root / "mkdocs.yml").blocks(self.path)
        meta = sources.head(self.path)
        source = ledger.source_digest(self.path)
        self.items = []
        for n, block in enumerate(blocks):
            name = f"line {block.fence.opening[1]}"
            item = PageBlock.from_parent(self, name=name, obj=block)
            item.number = n
            # Reports carry this to whoever keeps the ledger, from other processes too.
            about = {
                "page": self.page,
                "source": source,
                "number": n,
                "of": len(blocks),
                "digest": block.digest,
                "line": block.fence.opening[1],
                "figure": block.fence.language in FIGURES,
                "shown": digest(block.shown.code) if block.shown else None,
            }
            item.user_properties.append(("block", about))
            item.add_marker(pytest.mark.timeout(meta.get("time_limit", TIME_LIMIT)))
            for mark in block.marks:
                item.add_marker(eval(mark, {"pytest": pytest}))
            self.items.append(item)
        return self.items

    def setup(self):
        self.program = Program(
            self.page,
            lambda tree, source, name: rewrite_asserts(tree, source, name, self.config),
        )
        self.isolation = self.program.isolated()
        self.isolation.__enter__()
        self.done = 0
        self.broken_at: PageBlock | None = None
        self.printed: list[tuple[Block, str]] = []  # and the page shows something else

    def teardown(self):
        self.isolation.__exit__(None, None, None)
        if self.config.option.write_outputs:
            outputs.write(self.path, self.config.rootpath, self.printed)


class PageBlock(codeblocks.TestBlock):
    parent: Page
    obj: Block
    number: int

    def runtest(self):
        page = self.parent
        if page.broken_at and page.broken_at is not self:
            pytest.skip(f"not run: the block at {page.broken_at.name} failed")
        try:
            # One block picked by hand still needs the ones before it.
            while page.done < self.number:
                page.items[page.done].execute()
                page.done += 1
            page.done += 1
            self.execute()
        except (Exception, SystemExit, pytest.fail.Exception):
            page.broken_at = self
            raise

    def execute(self) -> None:
        if self.obj.importorskip:
            pytest.importorskip(self.obj.importorskip)
        if self.obj.fence.language in FIGURES:
            self.draw()
        else:
            self.compare(self.parent.program.run(self.obj))

    def draw(self) -> None:
        """A figure is an output too: stored, and compared with what is drawn."""
        drawer = importlib.import_module(FIGURES[self.obj.fence.language])
        name = self.obj.fence.options["name"]
        for suffix, drawn in drawer.draw(self.parent.program, self.obj).items():
            stored = self.config.rootpath / figures.FOLDER / f"{name}{suffix}"
            if figures.same(stored, drawn):
                continue
            if not self.config.option.write_outputs:
                raise Stale(f"{stored.name} is not what this block draws now")
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_text(drawn)

    def compare(self, printed: str) -> None:
        shown = self.obj.shown.code if self.obj.shown else ""
        if _trimmed(printed) == _trimmed(shown):
            return
        if self.config.option.write_outputs:
            self.parent.printed.append((self.obj, printed))
        elif not shown:
            raise Stale(f"the block prints, and the page does not show it:\n{printed}")
        else:
            raise Stale(f"the page shows\n{shown}but the block prints\n{printed}")

    def repr_failure(self, excinfo):
        file, line = self.obj.fence.opening
        if excinfo.errisinstance(Stale):
            return f"{file}:{line}: {excinfo.value} (make outputs rewrites it)"
        if excinfo.errisinstance(pytest.fail.Exception):  # it took too long
            return f"{file}:{line}: {excinfo.value}"
        return self.parent.program.explain(excinfo.value)

    def reportinfo(self):
        return self.path, self.obj.fence.opening[1] - 1, f"{self.parent.page}"


def _trimmed(text: str) -> str:
    """Without the spaces at the ends of lines, which editors take away."""
    return re.sub(r"[ \t]+(?=\n)", "", text)


class Stale(Exception):
    """What the page shows is not what its block gives."""
