"""The last gate: hold the finished HTML against the ledger of the tests.

    python -m tools.gate site

It trusts nothing but the HTML. Every Python block in it must have run green in this
very state of the project, every shown output must have been compared, every figure
drawn; and what the generator lets pass in silence must not be there.
"""

import re
import sys
from pathlib import Path

from bs4 import BeautifulSoup

from tools import anatomy, generated, ledger, published, results, sources
from tools.blocks import digest, is_python

# Pygments calls them Python; they are what somebody once saw.
TRANSCRIPTS = ("pycon", "ipython", "pytb", "py2tb", "python-console", "cython")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])")

LEFTOVERS = {
    "--8<--": "an include that was not resolved",
    "```": "a fence that is not one",
    "~~~": "a fence that is not one",
    "\n/// ": "a block that is not one",
    "Traceback (most recent call last)": "a traceback",
    **dict.fromkeys(generated.MARKS, "a mark, not expanded"),
}


def check(site: Path, root: Path = sources.ROOT) -> list[str]:
    """All that is wrong with a built site, a line each."""
    known = ledger.read(root)["pages"]
    # The annotated notes show a figure that another page draws.
    figures = {
        block["digest"]: block
        for run in known.values()
        for block in run["blocks"]
        if block["figure"]
    }
    tables = {
        block["shown"]
        for name, run in known.items()
        for block in run["blocks"]
        if sources.is_lab(name)
    }
    faults, said = [], {}
    for source in sources.pages(root):
        name = source.relative_to(root).as_posix()
        page = sources.name(source)
        place = sources.address(page)
        built = site / place / "index.html"
        if not built.exists():
            faults.append(f"{name}: not in the site")
            continue
        html = BeautifulSoup(built.read_text(encoding="utf-8"), "html.parser")
        said[place] = f"{html.get_text(' ')} {html.get_text()}"
        run = known.get(name, {"blocks": [], "source": ledger.source_digest(source)})
        blocks = run["blocks"]
        concept = sources.has_notebook(source)
        found = _census(html, blocks, figures, tables)
        if run["source"] != ledger.source_digest(source):
            found.append("edited after its blocks ran: make test")
        if concept:
            file = sources.snippet(page, sources.head(source))
            found += _frame(html, file, root)
        found += anatomy.check(html, page, concept, root)
        found += _leftovers(html)  # it takes the page apart
        faults += [f"{name}: {fault}" for fault in found]
    return [*faults, *published.check(site, root, said)]


def _census(
    html: BeautifulSoup, blocks: list[dict], figures: dict, tables: set
) -> list[str]:
    """Blocks, outputs and figures: each was run, and each that was run is shown."""
    faults = []
    # Where the same code stands twice, the run that failed counts.
    ran = {b["digest"]: b for b in sorted(blocks, key=_passed)[::-1]}
    outputs = {block["shown"] for block in blocks if block["outcome"] == "passed"}
    shown = set()
    for box in html.select("div.highlight"):
        code = box.select_one("pre code")
        text = code.get_text() if code else ""
        classes = [c for c in box["class"] if c.startswith("language-")]
        language = "".join(classes).removeprefix("language-")
        first = (text.strip().split("\n") or [""])[0]
        if not text.strip():
            faults.append("an empty block")
        elif is_python(language) and language not in TRANSCRIPTS:
            shown.add(digest(text))
            faults += _outcome(ran.get(digest(text)), f"the block '{first}'")
        elif language not in ("", "text"):
            faults.append(f"a block of {language}, which nothing runs: {first}")
        elif digest(text) not in outputs:
            faults.append(f"an output that was not compared: {first}")
    for box in html.select("div.results"):
        if digest(results.read(box)) not in tables:
            faults.append("a table of results that no lab printed")
    drawn: set[str] = set()
    for figure in html.select("figure[data-code]"):
        code = figure["data-code"]
        faults += _outcome(ran.get(code) or figures.get(code), "a figure")
        faults += ["a figure stands twice"] * (code in drawn)
        drawn.add(code)
        if not figure.select_one("svg[role=img][aria-label], table"):
            faults.append("a figure without a text alternative")
    faults += [
        f"line {block['line']}: ran, but the page does not show it"
        for name, block in ran.items()
        if name not in shown | drawn
    ]
    return [*faults, *_strays(html), *_numbers(html)]


def _strays(html: BeautifulSoup) -> list[str]:
    """What looks like code, an output or a figure, and is none that was run."""
    text = html.select_one("article") or html
    faults = [
        f"code outside a fence: {stray.get_text()[:40]}"
        for stray in text.select("pre, samp, textarea, xmp, listing, plaintext")
        if not stray.find_parent(class_="highlight")
    ]
    faults += [
        f"code of several lines outside a fence: {code.get_text()[:40]}"
        for code in text.select("code:has(br)")
    ]
    faults += [
        f"a picture that no block draws: {str(drawing)[:60]}"
        for drawing in text.select("svg, img, canvas, picture, video, iframe, object")
        if not drawing.find_parent("figure", attrs={"data-code": True})
    ]
    return faults


def _numbers(html: BeautifulSoup) -> list[str]:
    """Numbers in captions and text alternatives stand in code or in an output, too."""
    code = " ".join(block.get_text() for block in html.select(".highlight pre"))
    known = {float(number) for number in _NUMBER.findall(code)}
    faults = []
    for figure in html.select("figure[data-code]"):
        said = [caption.get_text() for caption in figure.select("figcaption")]
        said += [svg["aria-label"] for svg in figure.select(":scope > svg[aria-label]")]
        for number in _NUMBER.findall(" ".join(said)):
            if float(number) not in known:
                faults.append(
                    f"a caption or alternative text says {number}: no code does"
                )
    return faults


def _passed(block: dict) -> bool:
    return block["outcome"] == "passed"


def _outcome(block: dict | None, what: str) -> list[str]:
    if block is None:
        return [f"{what} was never run in this state: make test"]
    if block["outcome"] != "passed":
        return [f"{what} (line {block['line']}) did not pass: {block['outcome']}"]
    return []


def _leftovers(html: BeautifulSoup) -> list[str]:
    faults = [f"{html.select_one('merror').get_text()}: bad TeX"] if html.merror else []
    if html.select_one(".arithmatex"):
        faults.append("a formula that was not rendered")
    for code in html.select("code"):
        if not code.find_parent("pre") and "\n" in code.get_text().strip():
            faults.append("a fence that is not one: its header was not understood")
    for code in html.select("pre, script, style"):
        if "--8<--" in code.get_text() and code.name == "pre":
            faults.append(LEFTOVERS["--8<--"])
        code.decompose()
    text = html.get_text()
    return faults + [why for mark, why in LEFTOVERS.items() if mark in text]


def _frame(html: BeautifulSoup, snippet: str, root: Path) -> list[str]:
    """What the theme adds to a concept, so that losing a hook can't go unseen."""
    faults = []
    stamp = html.select_one("aside.stamp")
    if stamp is None or "Not run" in stamp.get_text():
        faults.append("no stamp of a run")
    if not html.select_one("ul.concept"):
        faults.append("its place among the concepts is missing")
    links = [link["href"] for link in html.select("a[download]")]
    if (root / snippet).exists() and not any(link.endswith(snippet) for link in links):
        faults.append(f"{snippet} can't be downloaded")
    return faults


def main(site: str) -> int:
    faults = check(Path(site))
    for fault in faults:
        print(fault)
    pages = ledger.read()["pages"].values()
    blocks = sum(len(page["blocks"]) for page in pages)
    print(f"gate: {len(pages)} pages, {blocks} blocks, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
