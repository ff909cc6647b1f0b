"""A Python-Markdown extension: what the notes say, judged on the pages.

    /// claim | C18
        verdict: wrong

    What is right instead, in a line, with its source.
    ///

quotes the claim as it stands in notes.md, to the letter, and judges it on the page that
docs/claims.yml names for it. The block that proves it stands right below; where nothing
can be run, `unproven:` says why. A claim may be answered without a verdict: `no claim`.
"""

import re
import xml.etree.ElementTree as etree
from functools import cache
from pathlib import Path

import yaml
from markdown.util import AtomicString
from pymdownx.blocks import BlocksExtension
from pymdownx.blocks.block import Block, type_string, type_string_in

from tools import sources

DOCS = Path("docs")
NOTES = Path("notes.md")
SIGNS = {"holds": "✓", "loosely put": "≈", "wrong": "✗"}
ANSWERED = "no claim"  # a heading, an opinion, a dead link
_JUDGED = re.compile(r"^/// claim \| (C\d+)\n((?: {4}.*\n)+)", re.M)


def claims() -> dict[str, dict]:
    """All claims of the notes, in their order: id to page and wording (`says`, a list).

    Raises:
        ValueError: a quotation is not in the notes to the letter, or not just once; a
            word of the notes is neither quoted nor listed as no claim.
    """
    return _read()[0]


def marks() -> list[tuple[int, int, str | None]]:
    """Where the notes are quoted: start, end and the claim, or None for no claim."""
    return _read()[1]


def no_claims() -> list[dict]:
    """What is left of the notes: phrases (`says`), and why they claim nothing."""
    return _read()[2]


def _read() -> tuple[dict, list, list]:
    listed = (DOCS / "claims.yml").read_text(encoding="utf-8")
    return _parse(listed, NOTES.read_text(encoding="utf-8"))


@cache
def _parse(listed: str, notes: str) -> tuple[dict, list, list]:
    known = yaml.load(listed, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found, spans = {}, []
    for claim in known["claims"]:
        says = claim["says"] if isinstance(claim["says"], list) else [claim["says"]]
        found[claim["id"]] = {**claim, "says": says}
        spans += [(*_place(phrase, notes), claim["id"]) for phrase in says]
    for group in known["no_claims"]:
        spans += [(*_place(phrase, notes), None) for phrase in group["says"]]
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, name in [*spans, (len(notes), len(notes), None)]:
        if start < end:
            raise ValueError(f"claims.yml quotes twice: {notes[start:end]!r} ({name})")
        left = notes[end:start].strip(" \n#-.,:*")
        if re.search(r"[^\W\d_]", left):
            raise ValueError(f"neither judged nor listed as no claim: {left!r}")
        end = stop
    return found, spans, known["no_claims"]


def _place(phrase: str, notes: str) -> tuple[int, int]:
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    places = [match.span() for match in re.finditer(pattern, notes)]
    if len(places) != 1:
        raise ValueError(f"the notes say {len(places)} times, not once: {phrase!r}")
    return places[0]


def quotation(claim: dict) -> str:
    return " … ".join(claim["says"])


def judged() -> dict[str, dict]:
    """The claims that pages judge: id to page and verdict."""
    found: dict[str, dict] = {}
    known = claims()
    for path in sorted(DOCS.rglob("*.md")):
        for name, options in _JUDGED.findall(path.read_text(encoding="utf-8")):
            page = sources.name(path)
            if name not in known or name in found or known[name]["page"] != page:
                raise ValueError(f"{path}: claim {name} does not belong here")
            found[name] = {"page": page, **yaml.safe_load(options)}
            if found[name]["verdict"] not in [*SIGNS, ANSWERED]:
                raise ValueError(f"{path}: {name} has no verdict of {list(SIGNS)}")
    return found


def tally(verdicts: list[str]) -> str:
    """How many hold, are loosely put, are wrong, in words and signs."""
    counts = {word: verdicts.count(word) for word in SIGNS}
    words = {"holds": "hold"} if counts["holds"] != 1 else {}
    listed = [(n, f"{words.get(w, w)} {SIGNS[w]}") for w, n in counts.items()]
    return ", ".join(f"{n} {what}" for n, what in listed if n)


class Claim(Block):
    NAME = "claim"
    ARGUMENT = True
    OPTIONS = {  # noqa: RUF012
        "verdict": ["", type_string_in([*SIGNS, ANSWERED])],
        "unproven": ["", type_string],
    }

    def on_validate(self, parent):
        if self.argument not in claims() or not self.options["verdict"]:
            raise ValueError(f"{self.argument}: no such claim, or no verdict")
        return True

    def on_create(self, parent):
        name = self.argument
        claim = etree.SubElement(parent, "div", {"class": "claim", "id": name.lower()})
        claim.set("data-verdict", self.options["verdict"])
        quote = etree.SubElement(claim, "p", {"class": "claim-says"})
        words = AtomicString(quotation(claims()[name]))  # no Markdown: to the letter
        etree.SubElement(quote, "q").text = words
        return claim

    def on_end(self, block):
        verdict = self.options["verdict"]
        word = etree.Element("span", {"class": "verdict"})
        word.text = f"{SIGNS[verdict]} {verdict}" if verdict in SIGNS else "answered"
        if len(block) < 2 or block[1].tag != "p":
            raise ValueError(f"{self.argument}: say in a line what is right")
        block[1].text, word.tail = None, f" {block[1].text}"
        block[1].insert(0, word)
        if reason := self.options["unproven"]:
            foot = etree.SubElement(block, "p", {"class": "claim-unproven"})
            foot.text = f"Nothing was run: {reason}."


class ClaimsExtension(BlocksExtension):
    def extendMarkdownBlocks(self, md, block_mgr):
        block_mgr.register(Claim, self.getConfigs())


def makeExtension(**kwargs):
    return ClaimsExtension(**kwargs)
