"""A Python-Markdown extension: lines of a formula and of its code mark each other.

A formula numbers its lines with `\\tag{1}`; the line of the core that computes one has
the number in a comment, `# (1): why`. Both get the class `n1`, and can be focused: the
style sheet marks all of a number when one of them is pointed at. No script is needed.
"""

import re
import xml.etree.ElementTree as etree

from markdown.postprocessors import Postprocessor

from tools.extension import extension

_MATH = re.compile(r"<math\b(?:(?!</math>).)*<mtext>\(\d\)</mtext>.*?</math>", re.S)
_CORE = re.compile(
    r'(<div class="[^"]*\bcore\b[^"]*highlight">.*?<code>)(.*?)(</code>)', re.S
)
_NUMBER = re.compile(r'<span class="c1"># \((\d)\)')


class Numbered(Postprocessor):
    def run(self, text):
        text = _MATH.sub(lambda found: _rows(found[0]), text)
        return _CORE.sub(lambda found: found[1] + _lines(found[2]) + found[3], text)


def _rows(mathml: str) -> str:
    math = etree.fromstring(mathml)
    for row in math.iterfind("./mtable/mtr"):
        number = re.fullmatch(r"\((\d)\)", "".join(row[-1].itertext()))
        if number:
            row.set("class", f"n{number[1]}")
            row.set("tabindex", "0")
    return etree.tostring(math, encoding="unicode", short_empty_elements=False)


def _lines(code: str) -> str:
    lines = code.split("\n")
    for n, line in enumerate(lines):
        if number := _NUMBER.search(line):
            lines[n] = f'<span class="n{number[1]}" tabindex="0">{line}</span>'
    return "\n".join(lines)


# After what was stashed, formulas and highlighted code, is back (30).
makeExtension = extension("postprocessors", Numbered, "numbered", 5)
