"""A Python-Markdown extension: `[MAP]` on the home page becomes the map of concepts.

Each page whose front matter has `requires` is a box that links to it, in the band of
its chapter, as far to the right as there are pages to know before it; a line leads
from what is needed to what it opens. A box that needs nothing is filled. In a column
of a chapter the boxes stand in the order of the nav in mkdocs.yml.
"""

import html
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.utils.meta import get_data

DOCS = Path("docs")
BOX, HEIGHT, GAP, ROW, TITLE = 170, 40, 48, 54, 26


def concepts(docs: Path = DOCS) -> dict[str, dict]:
    """The pages of the map: name to title and requires.

    Raises:
        ValueError: a page requires one that is not there, or itself in the end.
    """
    found = {}
    for path in sorted(docs.rglob("*.md")):
        meta = get_data(path.read_text(encoding="utf-8-sig"))[1]
        if "requires" in meta:
            name = path.relative_to(docs).with_suffix("").as_posix()
            found[name] = {"title": meta["title"], "requires": meta["requires"]}
    for name, page in found.items():
        for other in page["requires"]:
            if other not in found:
                raise ValueError(f"{name} requires {other}, which is no concept")
    try:
        order = TopologicalSorter({n: p["requires"] for n, p in found.items()})
        for name in order.static_order():
            before = [found[other]["column"] for other in found[name]["requires"]]
            found[name]["column"] = max(before, default=-1) + 1
    except CycleError as error:
        raise ValueError(f"in a circle: {' requires '.join(error.args[1])}") from None
    return found


def layout(pages: dict[str, dict], chapters: list[str]) -> tuple[dict, dict, int, int]:
    """Where each box and each chapter's title stands, and the size of it all."""
    boxes, titles, top = {}, {}, 0
    for chapter in chapters:
        titles[chapter] = top
        filled: dict[int, int] = {}
        for name in [n for n in pages if n.rpartition("/")[0] == chapter]:
            column = pages[name]["column"]
            row = filled[column] = filled.get(column, -1) + 1
            boxes[name] = (column * (BOX + GAP), top + TITLE + row * ROW)
        top += TITLE + (max(filled.values(), default=-1) + 1) * ROW + 10
    right = max((x for x, _ in boxes.values()), default=0) + BOX
    return boxes, titles, right + 2, top


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    """From box to box; past the columns between them it runs below the boxes."""
    start, here = f"M{x1} {y1}", (x1, y1)
    if x2 - x1 > GAP:
        below = y1 + ROW / 2
        half = x1 + GAP / 2
        start += f"C{half} {y1} {half} {below} {x1 + GAP} {below}H{x2 - GAP}"
        here = (x2 - GAP, below)
    half = (here[0] + x2) / 2
    return f"{start}C{half} {here[1]} {half} {y2} {x2} {y2}"


def _bus(x1: float, y1: float, x2: float, y2: float, lane: int) -> str:
    """From another chapter: straight, so that lines to one box share their way."""
    y2 += 0.5  # on whole pixels, or lines that share their way look thick
    past = f"V{y2 + ROW / 2}H{x2 - 9.5}" if x2 - x1 > GAP else ""
    return f"M{x1} {y1}h{8.5 + 6 * lane}{past}V{y2}H{x2}"


def _lanes(pages: dict[str, dict]) -> dict[tuple[str, str], int]:
    """In which lane the line from one page to another of a later chapter runs.

    Lines share a lane where that misleads nobody: all of it leads to the same pages.
    """
    lanes: dict[int, list[set]] = {}
    found = {}
    for name, page in pages.items():
        chapter = name.rpartition("/")[0]
        away = [o for o in page["requires"] if o.rpartition("/")[0] != chapter]
        for other in away:
            column = pages[other]["column"]
            sources = {o for o in away if pages[o]["column"] == column}
            known = lanes.setdefault(column, [])
            if sources not in known:
                known.append(sources)
            found[other, name] = known.index(sources)
    return found


def in_reading_order(pages: dict[str, dict], nav: str) -> dict[str, dict]:
    """The pages as the site's configuration, given as text, lists them."""
    return dict(sorted(pages.items(), key=lambda item: nav.find(f"{item[0]}.md")))


def draw(pages: dict[str, dict], order: list[str]) -> str:
    """The map as SVG; chapters that `order` does not name come last."""
    chapters = {name.rpartition("/")[0] for name in pages}
    rank = {chapter: n for n, chapter in enumerate(order)}
    chapters = sorted(chapters, key=lambda c: (rank.get(c, len(rank)), c))
    boxes, titles, width, height = layout(pages, chapters)
    marks, links, lanes = [], [], _lanes(pages)
    for chapter, y in titles.items():
        text = html.escape(chapter.replace("-", " ").capitalize())
        marks.append(f'<text y="{y + 14}">{text}</text>')
    for name, page in pages.items():
        x, y = boxes[name]
        for other in page["requires"]:
            x1, y1 = boxes[other][0] + BOX, boxes[other][1] + HEIGHT / 2
            ends = x1, y1, x, y + HEIGHT / 2
            lane = lanes.get((other, name))
            line = _line(*ends) if lane is None else _bus(*ends, lane)
            marks.append(f'<path d="{line}"/>')
        needs = ", ".join(pages[other]["title"] for other in page["requires"])
        says = page["title"] + (f", builds on {needs}" if needs else ", start here")
        start = "" if needs else ' class="start"'
        links.append(
            f'<a href="{name}/" aria-label="{html.escape(says)}"{start} '
            f'style="left:{x}px;top:{y}px;width:{BOX}px;height:{HEIGHT}px">'
            f"{html.escape(page['title'])}</a>"
        )
    return (
        '<nav class="map" aria-label="Map of the concepts" tabindex="0">'
        f'<div style="width:{width}px;height:{height}px">'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(marks)}</svg>'
        f"{''.join(links)}</div></nav>"
    )


class Map(Preprocessor):
    def __init__(self, md, chapters: list[str]):
        super().__init__(md)
        self.chapters = chapters

    def run(self, lines):
        if "[MAP]" not in lines:
            return lines
        nav = Path("mkdocs.yml").read_text(encoding="utf-8")
        drawn = draw(in_reading_order(concepts(), nav), self.chapters)
        return [drawn if line == "[MAP]" else line for line in lines]


class MapExtension(Extension):
    def __init__(self, **kwargs):
        self.config = {"chapters": [[], "the chapters in the reader's order"]}
        super().__init__(**kwargs)

    def extendMarkdown(self, md):
        md.preprocessors.register(Map(md, self.getConfig("chapters")), "map", 28)


def makeExtension(**kwargs):
    return MapExtension(**kwargs)
