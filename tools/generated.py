"""A Python-Markdown extension: a mark alone on its line becomes what is made of files.

`[NOTES]` the notes with their verdicts, `[RESULTS]` what the labs found, `[SNIPPETS]`
every public name. The text that a reader takes along has a plain form of each.
"""

import re

from markdown.preprocessors import Preprocessor

from tools import annotated, results, signatures
from tools.extension import extension

MARKS = {
    "[NOTES]": annotated.annotated,
    "[RESULTS]": results.collected,
    "[SNIPPETS]": signatures.listed,
}


class Generated(Preprocessor):
    def run(self, lines):
        expanded: list[str] = []
        for line in lines:
            mark = line.strip()
            expanded += MARKS[mark]() if mark in MARKS else [line]
        return expanded


def plain(text: str) -> str:
    """The text with its marks replaced, without HTML."""
    for mark, made in {**MARKS, "[NOTES]": annotated.listed}.items():
        if mark in text:
            text = text.replace(mark, re.sub(r"</?div[^>]*>\n", "", "\n".join(made())))
    return text


makeExtension = extension("preprocessors", Generated, "generated", 28)
