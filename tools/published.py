"""The files of the finished site: each is a page, or made of a page or a snippet.

What a reader takes along, the graphs of live figures, the search index and the files
for language models are held against what they are made of.
"""

import hashlib
import html
import json
import re
from pathlib import Path

from mkdocs.config import load_config

from tools import notebooks, sources
from tools.notebooks import SEPARATOR

# What the generator and the theme make, besides the pages.
FRAME = ("404.html", "assets/", "css/", "fonts/", "img/", "js/", "llms", "search/",
         "search.html", "sitemap.xml", "webfonts/")  # fmt: skip


def check(site: Path, root: Path, said: dict[str, str]) -> list[str]:
    """All that is wrong with the files of a site, a line each; `said` is the text of
    its pages, by address."""
    config = load_config(str(root / "mkdocs.yml"))
    known: dict[str, str | None] = {}  # None: a page, which the gate looks at
    texts = []
    for source in sources.pages(root):
        page = sources.name(source)
        made = notebooks.Cells(source, config)
        known[f"{sources.address(page)}index.html"] = None
        texts.append(made.markdown())
        known[f"{page}.md"] = texts[-1]
        if sources.has_notebook(source):
            known[f"{page}.ipynb"], known[f"{page}.py"] = made.notebook(), made.script()
    faults = []
    for path in sorted(path for path in site.rglob("*.*") if path.is_file()):
        name = path.relative_to(site).as_posix()
        if name.startswith(("assets/figures/", "snippets/")) and name not in known:
            source = root / ("docs" if name.startswith("assets") else "") / name
            known[name] = source.read_text(encoding="utf-8")
        elif path.suffix == ".pt":  # weights are named after their digest
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if not name.endswith(f"-{digest[:8]}.pt"):
                faults.append(f"{name}: not what it is named after")
            continue
        elif name.startswith(FRAME):
            continue
        if name not in known:
            faults.append(f"{name}: nobody has looked at it")
        elif known[name] not in (None, path.read_text(encoding="utf-8")):
            faults.append(f"{name}: not what it is made of")
    return faults + _search(site, said) + _for_models(site, texts)


def _search(site: Path, said: dict[str, str]) -> list[str]:
    """Entries of the search index that say what their page doesn't."""
    index = site / "search/search_index.json"
    if not index.exists():
        return []
    pages = {place: set(_words(text)) for place, text in said.items()}
    faults = []
    for entry in json.loads(index.read_text(encoding="utf-8"))["docs"]:
        place = entry["location"].partition("#")[0]
        text = re.sub(r"<[^>]*>", " ", f"{entry['title']} {entry['text']}")
        words = _words(html.unescape(text))
        if new := [word for word in words if word not in pages.get(place, ())]:
            faults.append(f"search: {entry['location']} doesn't say {new[0]!r}")
    return faults


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _for_models(site: Path, texts: list[str]) -> list[str]:
    """Whether the one file of all pages is all pages, and nothing else."""
    file = site / "llms-full.txt"
    if not file.exists():
        return []
    found = file.read_text(encoding="utf-8")
    if sorted(found.split(SEPARATOR)) != sorted(SEPARATOR.join(texts).split(SEPARATOR)):
        return ["llms-full.txt: not the pages"]
    return []
