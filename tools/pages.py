"""A pytest plugin: every block of every page is a test.

It builds on pytest-codeblocks, whose comments say what to do with a block, and makes
up for what that lacks: see blocks.py for what a block is and program.py for how a page
runs. `--write-outputs` rewrites the shown outputs and figures instead of comparing.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from _pytest.assertion.rewrite import rewrite_asserts
from mkdocs.config import load_config
from pytest_codeblocks import plugin as codeblocks

from tools import figures, ledger, sources, takeaway
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
    config.stash[_RUN] = Run(config)
    config.pluginmanager.register(config.stash[_RUN])


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
        self.config.stash[_RUN].collected.append(self.path)
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

    def teardown(self):
        self.isolation.__exit__(None, None, None)


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
            self.config.stash[_RUN].outputs.append((self, printed))
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


class Run:
    """What this run of pytest learns, written down at its end."""

    def __init__(self, config):
        self.config = config
        self.state = ledger.state(config.rootpath)
        self.collected: list[Path] = []
        self.outcomes: dict[str, str] = {}
        self.blocks: dict[str, dict[str, dict]] = {}
        self.comparisons: dict[str, list[dict]] = {}
        self.outputs: list[tuple[PageBlock, str]] = []
        self.changed = False

    def pytest_runtest_logreport(self, report):
        node = report.nodeid
        known = self.outcomes.get(node, "passed")
        self.outcomes[node] = known if report.passed else report.outcome
        for kind, value in report.user_properties:
            if kind == "block":
                self.blocks.setdefault(value["page"], {})[node] = value
            elif kind == "compared" and report.when == "call" and report.passed:
                self.comparisons.setdefault(node, []).append(value)

    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workerinput"):  # the process that started it writes
            return
        self.write_outputs()
        root = self.config.rootpath
        self.changed = ledger.state(root) != self.state
        if not self.changed:
            ledger.write(root, self.pages(), self.compared(), torch.__version__)

    def pytest_terminal_summary(self, terminalreporter):
        if self.changed:
            terminalreporter.line(
                "The project changed meanwhile: this run is not kept."
            )

    def pages(self) -> dict[str, dict]:
        """Pages that ran from the first block to the last, and are as they were."""
        pages = {}
        for name, found in self.blocks.items():
            ordered = sorted(found.items(), key=lambda pair: pair[1]["number"])
            (_, first), *_ = ordered
            now = ledger.source_digest(self.config.rootpath / name)
            if len(found) < first["of"] or now != first["source"]:
                continue
            kept = ("digest", "line", "figure", "shown")
            blocks = [
                {key: about[key] for key in kept} | {"outcome": self.outcomes[node]}
                for node, about in ordered
            ]
            pages[name] = {"source": now, "blocks": blocks}
        return pages

    def compared(self) -> dict[str, dict]:
        """For each test file and reference: how often compared, how far off."""
        compared = {}
        for node, found in self.comparisons.items():
            file = node.split("::")[0]
            for entry in found:
                key = f"{entry['against']} in {entry['dtype']}"
                entries = compared.setdefault(file, {})
                best = entries.setdefault(key, {**entry, "times": 0})
                best["times"] += 1
                best["difference"] = max(best["difference"], entry["difference"])
        return compared

    def write_outputs(self) -> None:
        by_file: dict[Path, list[tuple[int, int, list[str]]]] = {}
        for item, printed in self.outputs:
            lines = item.path.read_text().split("\n")
            fence, shown = item.obj.fence, item.obj.shown
            indent = re.match(r"\s*", lines[fence.opening[1] - 1])[0]
            body = [indent + line if line else "" for line in printed.split("\n")[:-1]]
            if shown:
                start, stop = shown.opening[1], shown.opening[1] + len(shown.origins)
            else:
                start = stop = _closing_line(lines, fence) if printed else 0
                marker = "<!--pytest-codeblocks:expected-output-->"
                body = [
                    "",
                    indent + marker,
                    "",
                    indent + "```text",
                    *body,
                    indent + "```",
                ]
            by_file.setdefault(item.path, []).append((start, stop, body))
        for path, edits in by_file.items():
            lines = path.read_text().split("\n")
            for start, stop, body in sorted(edits, reverse=True):
                lines[start:stop] = body
            path.write_text("\n".join(lines))
        if self.config.option.write_outputs:
            config = load_config(str(self.config.rootpath / "mkdocs.yml"))
            for page in filter(sources.has_notebook, self.collected):
                takeaway.store(page, config)


def _closing_line(lines: list[str], fence) -> int:
    ticks = re.search(r"`{3,}|~{3,}", lines[fence.opening[1] - 1])[0]
    for n in range(fence.opening[1], len(lines)):
        if lines[n].strip() == ticks:
            return n + 1
    raise ValueError(f"{fence.opening}: the fence is not closed in this file")


_RUN = pytest.StashKey[Run]()
