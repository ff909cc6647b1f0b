"""A Python-Markdown extension: the claims of the notes and their verdicts.

    /// claim | C18
        verdict: wrong
        proof: the-heads-fill-the-embedding

    What is right instead, in a line, with its source.
    ///

judges a claim on the page that docs/claims.yml names for it; `proof` is the heading
whose code shows it (left out where nothing can be run). `[CLAIMS]` alone on a line is
the list of them all, generated from the pages.
"""

import re
import xml.etree.ElementTree as etree
from functools import cache
from pathlib import Path

import yaml
from markdown.preprocessors import Preprocessor
from pymdownx.blocks import BlocksExtension
from pymdownx.blocks.block import Block, type_string, type_string_in

DOCS = Path("docs")
SIGNS = {"holds": "✓", "loosely put": "≈", "wrong": "✗"}
_JUDGED = re.compile(r"^/// claim \| (C\d+)\n((?: {4}.*\n)+)", re.M)


def claims() -> dict[str, dict]:
    """All claims of the notes, in their order: id to section, page and wording."""
    return _parse((DOCS / "claims.yml").read_text(encoding="utf-8"))


@cache
def _parse(text: str) -> dict[str, dict]:
    sections = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        claim["id"]: {"section": part["section"], **claim}
        for part in sections
        for claim in part["claims"]
    }


def judged() -> dict[str, dict]:
    """The claims that pages judge: id to page, verdict and proof."""
    found: dict[str, dict] = {}
    known = claims()
    for path in sorted(DOCS.rglob("*.md")):
        for name, options in _JUDGED.findall(path.read_text(encoding="utf-8")):
            page = path.relative_to(DOCS).with_suffix("").as_posix()
            if name not in known or name in found or known[name]["page"] != page:
                raise ValueError(f"{path}: claim {name} does not belong here")
            found[name] = {"page": page, "proof": None, **yaml.safe_load(options)}
            if found[name]["verdict"] not in SIGNS:
                raise ValueError(f"{path}: {name} has no verdict of {list(SIGNS)}")
    return found


class Claim(Block):
    NAME = "claim"
    ARGUMENT = True
    OPTIONS = {  # noqa: RUF012
        "verdict": ["", type_string_in(list(SIGNS))],
        "proof": ["", type_string],
    }

    def on_validate(self, parent):
        if self.argument not in claims() or not self.options["verdict"]:
            raise ValueError(f"{self.argument}: no such claim, or no verdict")
        return True

    def on_create(self, parent):
        verdict = self.options["verdict"]
        name = self.argument
        claim = etree.SubElement(parent, "div", {"class": "claim", "id": name.lower()})
        claim.set("data-verdict", verdict)
        head = etree.SubElement(claim, "p", {"class": "claim-says"})
        word = etree.SubElement(head, "span", {"class": "verdict"})
        word.text = f"{SIGNS[verdict]} {verdict}"
        word.tail = " "
        quote = etree.SubElement(head, "q")
        quote.text = claims()[name]["says"]
        return claim

    def on_end(self, block):
        foot = etree.SubElement(block, "p", {"class": "claim-proof"})
        if proof := self.options["proof"]:
            link = etree.SubElement(foot, "a", {"href": f"#{proof}"})
            link.text = f"{self.argument}: the proof"
        else:
            foot.text = f"{self.argument}: judged by its source; nothing was run"


class ClaimsList(Preprocessor):
    def run(self, lines):
        expanded: list[str] = []
        for line in lines:
            expanded += self.table() if line.strip() == "[CLAIMS]" else [line]
        return expanded

    def table(self) -> list[str]:
        verdicts = judged()
        by_word = {w: sum(v["verdict"] == w for v in verdicts.values()) for w in SIGNS}
        lines = [
            f"{len(claims())} claims; {len(verdicts)} judged so far: "
            + ", ".join(f"{n} {word}" for word, n in by_word.items())
            + ".",
        ]
        section = None
        for name, claim in claims().items():
            if claim["section"] != section:
                lines += ["", "</div>"] if section else []
                section = claim["section"]
                lines += ["", f"## {section}", "", '<div class="claims" markdown>', ""]
                lines += ["| No. | The claim | Verdict |", "|---|---|---|"]
            says = claim["says"].replace("|", r"\|")
            says = re.sub(r"([*_\[\]{}])", r"\\\1", says)
            if found := verdicts.get(name):
                word = found["verdict"]
                link = f"[{SIGNS[word]} {word}]({claim['page']}.md#{name.lower()})"
                if found["proof"]:
                    link += f", [proof]({claim['page']}.md#{found['proof']})"
            else:
                link = "its page is not written yet"
            lines.append(f"| {name} | {says} | {link} |")
        return [*lines, "", "</div>" if section else "", ""]


class ClaimsExtension(BlocksExtension):
    def extendMarkdownBlocks(self, md, block_mgr):
        block_mgr.register(Claim, self.getConfigs())
        md.preprocessors.register(ClaimsList(md), "claims", 28)


def makeExtension(**kwargs):
    return ClaimsExtension(**kwargs)
