"""Rewrite what a page shows: the outputs of its blocks, and the notebook made of it."""

import re
from pathlib import Path

from mkdocs.config import load_config

from tools import notebooks, sources
from tools.blocks import Block, Fence

MARKER = "<!--pytest-codeblocks:expected-output-->"


def write(page: Path, root: Path, printed: list[tuple[Block, str]]) -> None:
    """Put what blocks printed, in the order they stand in, under them."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for block, text in reversed(printed):  # so that the lines above keep their numbers
        fence, shown = block.fence, block.shown
        indent = re.match(r"\s*", lines[fence.opening[1] - 1])[0]
        body = [indent + line if line else "" for line in text.split("\n")[:-1]]
        if shown:
            start, stop = shown.opening[1], shown.opening[1] + len(shown.origins)
        else:
            start = stop = _closing_line(lines, fence)
            opening = ["", indent + MARKER, "", indent + "```text"]
            body = [*opening, *body, indent + "```"]
        lines[start:stop] = body
    page.write_text("\n".join(lines), encoding="utf-8")
    if sources.has_notebook(page):
        config = load_config(str(root / "mkdocs.yml"))
        notebooks.store(notebooks.Cells(page, config))


def _closing_line(lines: list[str], fence: Fence) -> int:
    ticks = re.search(r"`{3,}|~{3,}", lines[fence.opening[1] - 1])[0]
    for n in range(fence.opening[1], len(lines)):
        if lines[n].strip() == ticks:
            return n + 1
    raise ValueError(f"{fence.opening}: the fence is not closed in this file")
