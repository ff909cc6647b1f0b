"""Begin a concept: page, snippet, test and its line in the navigation.

    python -m tools.new chapter/name

The skeleton doubles a number, and is sound: it passes its tests and the gate. Replace
what it says, part by part.
"""

import sys
from pathlib import Path

SKELETON = Path(__file__).parent / "skeleton"


def begin(concept: str, root: Path = Path()) -> list[str]:
    """Write the files of chapter/name, none over one that is there; name them."""
    chapter, name = concept.split("/")
    folder, function = chapter.replace("-", "_"), name.replace("-", "_")
    words = {
        "docs/chapter/double": f"docs/{chapter}/{name}",
        "chapter/double": f"{folder}/{function}",
        "chapter.double": f"{folder}.{function}",
        "title: Double": f"title: {name.replace('-', ' ').capitalize()}",
        "# Double": f"# {name.replace('-', ' ').capitalize()}",
        "double": function,
    }
    files = {
        f"docs/{chapter}/{name}.md": "page.md",
        f"snippets/{folder}/{function}.py": "snippet.py",
        f"tests/{folder}/test_{function}.py": "test.py",
    }
    if there := [file for file in files if (root / file).exists()]:
        raise FileExistsError(f"{there[0]} is there already")
    for file, template in files.items():
        text = (SKELETON / template).read_text(encoding="utf-8")
        for word, new in words.items():
            text = text.replace(word, new)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    return [*files, _navigate(chapter, name, root / "mkdocs.yml")]


def _navigate(chapter: str, name: str, config: Path) -> str:
    """Put the page at the end of its chapter, a new chapter before the labs."""
    lines = config.read_text(encoding="utf-8").split("\n")
    page = f"      - {chapter}/{name}.md"
    known = [
        n for n, line in enumerate(lines) if line.startswith(f"      - {chapter}/")
    ]
    if known:
        lines.insert(known[-1] + 1, page)
    else:
        title = chapter.replace("-", " ").capitalize()
        place = lines.index("  - Labs:")
        lines[place:place] = [f"  - {title}:", page]
    config.write_text("\n".join(lines), encoding="utf-8")
    return config.name


if __name__ == "__main__":
    for file in begin(sys.argv[1]):
        print(file)
