"""The notes, whole, each phrase judged.

The text is notes.md as it was written, line by line. A judged phrase is a link to the
place on a page that judges and proves it, with the verdict in sign and word behind it.
"""

import html
import re
from pathlib import Path

from markdown.extensions.toc import slugify

from tools import figures
from tools.blocks import digest
from tools.claims import (
    ANSWERED,
    DOCS,
    NOTES,
    SIGNS,
    claims,
    judged,
    marks,
    no_claims,
    quotation,
    tally,
)


def annotated() -> list[str]:
    """The notes in Markdown and HTML, after a line that counts the verdicts."""
    verdicts, known = judged(), claims()
    words = [found["verdict"] for found in verdicts.values()]
    count = f"**{len(known)} phrases: {tally(words)}; {words.count(ANSWERED)} answered "
    missing = len(known) - len(words)
    count += f"without a verdict; {missing} open.**"
    text = NOTES.read_text(encoding="utf-8")
    made, start = [count, ""], 0
    for line in text.split("\n"):
        made += _line(line, start, verdicts)
        start += len(line) + 1
    made += ['??? note "What claims nothing"', ""]
    for group in no_claims():
        listed = ", ".join(
            f"“{_plain(phrase.strip('# '))}”" for phrase in group["says"]
        )
        made.append(f"    - {listed}: {group['because']}.")
    return [*made, ""]


def listed() -> list[str]:
    """The phrases with their verdicts, in plain Markdown."""
    known, verdicts = claims(), judged()
    return [
        f"- {name}: “{quotation(claim)}” "
        + (verdicts[name]["verdict"] if name in verdicts else "not judged yet")
        for name, claim in known.items()
    ]


def _line(line: str, start: int, verdicts: dict) -> list[str]:
    """A line of the notes: a heading, or a paragraph with its own marker and indent."""
    level = len(line) - len(line.lstrip("#"))
    bare = line.lstrip("# ")
    if not bare.strip():
        return [""]
    marked = _marked(bare, start + len(line) - len(bare), verdicts)
    if level:
        anchor = slugify(bare, "-")
        return ["", f"{'##' if level < 3 else '###'} {marked} {{: #{anchor} }}", ""]
    indent = ' class="in"' * (line[0] in " -" or line[:1].isdigit())
    made = [f"<p{indent}>{marked}</p>"]
    if "![" in line:  # a picture that is lost: that of the page which answers it
        (page,) = (
            f["page"] for n, f in verdicts.items() if "![" in quotation(claims()[n])
        )
        made += ["", _picture(DOCS / f"{page}.md"), ""]
    return made


def _picture(page: Path) -> str:
    """The drawing that opens a page, as it stands there."""
    text = page.read_text(encoding="utf-8")
    fence = re.search(
        r'^```figure ([^\n]*lead="yes".*?)\n(.*?)\n```', text, re.S | re.M
    )
    options = dict(re.findall(r'(\w+)="([^"]*)"', fence[1]))
    stored = figures.FOLDER / f"{options.pop('name')}.svg"
    return figures.place(stored, digest(fence[2] + "\n"), {**options, "lead": "no"})


def _marked(text: str, start: int, verdicts: dict) -> str:
    """The text, which starts there in the notes, with its quoted phrases marked."""
    known, parts, done = claims(), [], start
    end = start + len(text)
    for first, last, name in marks():
        if name is None or last <= start or first >= end:
            continue
        here, there = max(first, start), min(last, end)
        parts.append(_plain(text[done - start : here - start]))
        phrase = _plain(text[here - start : there - start])
        done = there
        if found := verdicts.get(name):
            word = found["verdict"]
            target = f"{known[name]['page']}/#{name.lower()}"
            parts.append(
                f'<a class="mark" data-verdict="{word}" href="../{target}">{phrase}</a>'
            )
            label = f"{SIGNS[word]} {word}" if word in SIGNS else "answered"
        else:
            word, label = "open", "open"
            parts.append(f'<span class="mark" data-verdict="open">{phrase}</span>')
        if last <= end:
            parts.append(f' <small data-verdict="{word}">{label}</small>')
    parts.append(_plain(text[done - start :]))
    return "".join(parts)


def _plain(text: str) -> str:
    """Safe in HTML, and without meaning in Markdown."""
    text = html.escape(text, quote=False)
    return "".join(f"&#{ord(c)};" if c in "*_[]()!`~^$\\{}" else c for c in text)
