"""A Python-Markdown extension: what the top of a page shows before it is explained.

A figure whose fence says `lead="yes"` runs where it stands and is shown after the lede:
before the first list, or the first section. The same figure is not shown twice. Behind
what comes before the first section a line counts the page's verdicts and leads there.
"""

import xml.etree.ElementTree as etree

from markdown.treeprocessors import Treeprocessor
from markdown.util import HTML_PLACEHOLDER_RE

from tools.claims import SIGNS, tally
from tools.extension import extension


class Opening(Treeprocessor):
    def run(self, root):
        first = next((n for n, e in enumerate(root) if e.tag == "h2"), None)
        if first is None:
            return
        claims = root.findall(".//div[@class='claim']")
        verdicts = [claim.get("data-verdict") for claim in claims]
        if counted := tally([word for word in verdicts if word in SIGNS]):
            line = etree.Element("p", {"class": "verdicts"})
            line.text = (
                f"This site tests one person's notes. On this topic: {counted}. "
            )
            link = etree.SubElement(line, "a", {"href": "#what-the-notes-say"})
            link.text = "Where, and why"
            root.insert(first, line)
        self.lead(root, first)

    def lead(self, root, first: int) -> None:
        """Moves the lead figure up."""
        found = [
            (parent, child)
            for parent in root.iter()
            for child in parent
            if child.tag == "p" and self.is_lead(child.text or "")
        ]
        if len(found) > 1:
            raise ValueError("a page has one lead figure")
        for parent, child in found:
            parent.remove(child)
            tops = [n for n, e in enumerate(root) if e.tag == "ul" and n < first]
            root.insert(min(tops, default=first), child)

    def is_lead(self, text: str) -> bool:
        stashed = HTML_PLACEHOLDER_RE.fullmatch(text.strip())
        html = self.md.htmlStash.rawHtmlBlocks[int(stashed[1])] if stashed else ""
        return isinstance(html, str) and " data-lead" in html.partition(">")[0]


# After the inline patterns (20), so that what is moved is whole.
makeExtension = extension("treeprocessors", Opening, "opening", 2)
