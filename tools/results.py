"""What the labs found, beside what the papers say: one table a lab, in the nav's order.

A lab prints its table in the cell that is marked `results`. The rows are taken from the
notebook that the repository keeps, which a run of the lab is held against.
"""

from pathlib import Path

import nbformat
from bs4 import Tag

from tools import sources

COLUMNS = ["What", "Paper", "There", "Here", "Seeds"]


def collected() -> list[str]:
    """A section for each lab: its table, and how long it took where."""
    lines: list[str] = []
    for _, lab in sources.in_order():
        source = Path("docs") / lab
        if not sources.is_lab(source) or not sources.notebook(source).exists():
            continue
        head = sources.head(source)
        title = head["title"].removeprefix("Lab: ")
        stored = nbformat.read(sources.notebook(source), as_version=4)
        outputs = [o.text for c in stored.cells for o in c.get("outputs", [])]
        for printed in (text for text in outputs if columns(text) == COLUMNS):
            lines += [
                f"## [{title[0].upper() + title[1:]}]({lab})",
                "",
                head["description"],
                "",
                *table(printed).split("\n"),
                "",
            ]
            if ran := stored.metadata.get("ran"):
                took = f"{ran['seconds']} seconds on {ran['machine']}"
                lines += [f"{took}, torch {ran['torch']}.", ""]
    return lines


def columns(printed: str) -> list[str]:
    return printed.split("\n")[0].strip("| ").split(" | ")


def table(printed: str) -> str:
    """A table that a lab printed, as the site's Markdown."""
    return f'<div class="results" markdown="block">\n\n{printed.rstrip()}\n\n</div>'


def words(printed: str) -> str:
    """The words of a printed table, as they stand in a finished page."""
    head, _, *rows = (line.strip("| ") for line in printed.strip().split("\n"))
    return "\n".join([head, *rows])


def read(box: Tag) -> str:
    """The words of a table in a finished page."""
    rows = [[cell.get_text() for cell in row(["th", "td"])] for row in box("tr")]
    return "\n".join(" | ".join(row) for row in rows)
