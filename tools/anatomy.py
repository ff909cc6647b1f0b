"""What a page must have, and what it may ask of a reader; checked on finished HTML.

The order of its sections, the figure that opens it, the core beside the formula, every
claim judged and proved where it stands, and the limits of length. How tall a page is,
the browser tests measure (tests/site/test_pages.py).
"""

import ast
from copy import copy
from pathlib import Path

from bs4 import BeautifulSoup, Tag

from tools import claims, sources
from tools.blocks import digest
from tools.program import asserts
from tools.sources import is_lab

WORDS, CORE_LINES, TRAPS, GLANCE = 650, 12, 4, 3
SECTIONS = [
    "The idea",
    "By hand",
    "What the notes say",
    "What goes wrong",
    "Try it yourself",
    "Sources",
]


def check(html: BeautifulSoup, page: str, concept: bool, root: Path) -> list[str]:
    """All that is wrong with a page, a line each; `concept` is one with `requires`."""
    faults = _quotations(html, root)
    if concept:
        faults += _judgements(html, page)
    if concept and not is_lab(page):
        faults += _anatomy(html)
        head = sources.head(root / f"docs/{page}.md")
        faults += _core(html, root / sources.snippet(page, head))
    return faults


def _quotations(html: BeautifulSoup, root: Path) -> list[str]:
    """What stands as a quotation is in the notes, to the letter."""
    notes = " ".join((root / claims.NOTES).read_text(encoding="utf-8").split())
    return [
        f"not in the notes to the letter: “{part}”"
        for quote in html.select("q, blockquote > p")
        for part in " ".join(quote.get_text().split()).split(" … ")
        if part not in notes
    ]


def _judgements(html: BeautifulSoup, page: str) -> list[str]:
    """Each claim of the page is judged, and right below it stands what proves it."""
    planned = {name for name, claim in claims.claims().items() if claim["page"] == page}
    judged = {claim["id"].upper() for claim in html.select(".claim[id]")}
    faults = [f"claim {name} is not judged" for name in sorted(planned - judged)]
    for claim in html.select(".claim"):
        name = claim["id"].upper()
        words = claim.select_one(".verdict").get_text()
        if words == "answered":
            continue
        if not any(words == f"{sign} {word}" for word, sign in claims.SIGNS.items()):
            faults.append(f"claim {name} has no verdict")
        if not claim.select_one(".claim-unproven") and not _proof(claim):
            faults.append(f"claim {name}: no assertion stands below it")
    return faults


def _proof(claim: Tag) -> bool:
    """Whether code that asserts follows, before a heading or the next claim's proof."""
    below = claim.find_next_siblings(True)
    while below and "claim" in below[0].get("class", ()):  # claims may share a proof
        below.pop(0)
    for element in below:
        if element.name in ("h2", "h3") or "claim" in element.get("class", ()):
            return False
        if any(asserts(code) for code in _python(element)):
            return True
    return False


def _python(element: Tag) -> list[str]:
    """The Python blocks in an element, or the one that it is."""
    boxes = [element, *element.select("div.highlight")]
    return [
        box.select_one("pre code").get_text()
        for box in boxes
        if "highlight" in box.get("class", ()) and "language-python" in box["class"]
    ]


def _anatomy(html: BeautifulSoup) -> list[str]:
    """The order of a page, and what it may ask of a reader."""
    faults = []
    text = html.select_one("article") or html
    heads = [h.find(string=True, recursive=False) for h in text.select("h2")]
    if [head for head in heads if head in SECTIONS] != SECTIONS:
        faults.append(f"its sections are not {', '.join(SECTIONS)} in this order")
    top = [] if not text.h2 else text.h2.find_previous_siblings(True)
    if sum(element.has_attr("data-lead") for element in top) != 1:
        faults.append('no figure opens it: one has lead="yes"')
    glance = [e for e in top if e.name == "ul" and "concept" not in e.get("class", ())]
    if [len(one.select("li")) for one in glance] != [GLANCE]:
        faults.append(f"at a glance: a list of {GLANCE} lines before the first section")
    traps = text.select("h2#what-goes-wrong ~ h3")
    traps = [
        t for t in traps if t.find_previous_sibling("h2")["id"] == "what-goes-wrong"
    ]
    if len(traps) > TRAPS:
        faults.append(f"{len(traps)} traps, at most {TRAPS}")
    if (count := words(text)) > WORDS:
        faults.append(f"{count} words of prose, at most {WORDS}")
    return faults


def words(text: Tag) -> int:
    """Words of prose that are seen with the folds closed: no code, tables, quotations
    of the notes, formulas, sources or small print, nor what a figure draws."""
    text = copy(text)
    away = "pre, table, math, svg, live-figure, .filename, .claim q, .concept, .stamp"
    for element in text.select(f"{away}, .headerlink, .verdicts, .takeaway"):
        element.decompose()
    for fold in text.select("details > *:not(summary)"):
        fold.decompose()
    for element in text.select("h2#sources, h2#sources ~ *"):
        element.decompose()
    return len(text.get_text(" ").split())


def _core(html: BeautifulSoup, snippet: Path) -> list[str]:
    """The idea in a few lines, the whole file folded, and that both agree."""
    if not snippet.exists():
        return []
    cores = [box.select_one("pre code").get_text() for box in html.select(".core")]
    if not cores:
        return ["no block is its core: {.python .core}"]
    faults = []
    for core in cores:
        count = len(core_lines(core))
        if count > CORE_LINES:
            faults.append(f"a core of {count} lines, at most {CORE_LINES}")
    file = snippet.read_text(encoding="utf-8")
    folds = [
        fold
        for fold in html.select("details")
        if any(digest(code) == digest(file) for code in _python(fold))
    ]
    if not folds:
        return [*faults, f"{snippet.name} does not stand in a fold, whole"]
    ours, theirs = _defined("\n".join(cores)), _defined(file)
    if both := ours & theirs:
        faults.append(f"the file overwrites what the core defines: {sorted(both)}")
    for code in _python(folds[0]):
        named = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
        compared = named & ours and named & theirs and asserts(code)
        if digest(code) != digest(file) and compared:
            return faults
    return [*faults, "no assertion beside the file that it agrees with the core"]


def core_lines(core: str) -> list[str]:
    """The lines that count: neither blank nor an import nor a comment alone."""
    idle = ("import ", "from ", "#", ")")
    lines = [line.strip() for line in core.split("\n")]
    return [line for line in lines if line and not line.startswith(idle)]


def _defined(code: str) -> set[str]:
    """The public names that code defines at its top."""
    names = set()
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = [n for t in node.targets for n in ast.walk(t)]
            names |= {n.id for n in targets if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}
