"""Which pages there are, and what stands at their head."""

from pathlib import Path

import yaml
from mkdocs.utils.meta import get_data

ROOT = Path(__file__).resolve().parent.parent


def pages(root: Path = ROOT) -> list[Path]:
    """Every page of the site: Markdown, and labs, which are notebooks in Python."""
    docs = root / "docs"
    return sorted([*docs.rglob("*.md"), *docs.glob("labs/*.py")])


def is_lab(page: Path | str) -> bool:
    return Path(page).parent.name == "labs"


def head(page: Path) -> dict:
    """The front matter; in a lab it stands in comments."""
    text = page.read_text(encoding="utf-8-sig")
    if not is_lab(page):
        return get_data(text)[1]
    _, lines, _ = text.split("# ---\n", 2)
    return yaml.safe_load("\n".join(line[2:] for line in lines.split("\n")))


def snippet(name: str, head: dict) -> str:
    """The file that a page explains: of the page's name, or the one its head names."""
    return f"snippets/{head.get('snippet', name)}.py".replace("-", "_")


def has_notebook(page: Path) -> bool:
    """Concepts and labs have one; they say what they require."""
    return "requires" in head(page)
