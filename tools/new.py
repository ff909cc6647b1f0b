"""Start a concept: its page, its snippet, its test, and its line in the nav.

    make new PAGE=chapter/name

What it writes (tools/template/) runs, and squares numbers. What is red is yours to
write: the source of the snippet, the figure that opens the page, the verdicts.
"""

import re
import sys
from pathlib import Path

from tools import claims
from tools.sources import ROOT

TEMPLATES = Path(__file__).with_name("template")


def write(page: str, root: Path = ROOT) -> list[Path]:
    """Writes a concept's files, named as its page, and overwrites nothing.

    Raises:
        ValueError: page is no chapter/name of small letters, digits and hyphens.
        FileExistsError: one of the files is there.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*/[a-z][a-z0-9-]*", page):
        raise ValueError(f"PAGE must be like attention/multi-head, got {page!r}")
    chapter, name = page.replace("-", "_").split("/")
    made = {
        root / f"docs/{page}.md": "page.md",
        root / f"snippets/{chapter}/{name}.py": "snippet.py",
        root / f"tests/{chapter}/test_{name}.py": "test.py",
    }
    for path in made:
        if path.exists():
            raise FileExistsError(f"{path.relative_to(root)} is there already")
    words = {"TITLE": _title(page), "CHAPTER": chapter, "NAME": name}
    for path, template in made.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub("|".join(words), lambda word: words[word[0]], text))
    config = root / "mkdocs.yml"
    config.write_text(listed(config.read_text(encoding="utf-8"), page))
    return [*made, config]


def listed(config: str, page: str) -> str:
    """The configuration, the page last in its chapter; a new one stands before labs."""
    lines = config.split("\n")
    entry, chapter = f"      - {page}.md", page.partition("/")[0]
    known = [
        n for n, line in enumerate(lines) if line.startswith(f"      - {chapter}/")
    ]
    if known:
        lines.insert(known[-1] + 1, entry)
    else:
        labs = next(n for n, line in enumerate(lines) if line.startswith("  - Labs:"))
        lines[labs:labs] = [f"  - {_title(chapter)}:", entry]
    return "\n".join(lines)


def _title(path: str) -> str:
    return path.rpartition("/")[2].replace("-", " ").capitalize()


if __name__ == "__main__":
    try:
        for made in write(*sys.argv[1:] or [""]):
            print(made.relative_to(ROOT))
    except (ValueError, FileExistsError) as error:
        sys.exit(str(error))
    for name, claim in claims.claims().items():
        if claim["page"] == sys.argv[1]:
            print(f"{name}: “{claims.quotation(claim)}”")
