"""Which pages there are, what each is called, and what stands at its head."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from mkdocs.config import load_config
from mkdocs.utils.meta import get_data

ROOT = Path(__file__).resolve().parent.parent


def pages(root: Path = ROOT) -> list[Path]:
    """Every page of the site: Markdown, and labs, which are notebooks in Python."""
    docs = root / "docs"
    return sorted([*docs.rglob("*.md"), *docs.glob("labs/*.py")])


def in_order() -> Iterator[tuple[str, str]]:
    """The pages as the navigation has them: section, and path in docs/."""
    for entry in load_config("mkdocs.yml").nav:
        for title, under in ({"": entry} if isinstance(entry, str) else entry).items():
            for page in [under] if isinstance(under, str) else under:
                yield title, page


def name(page: Path) -> str:
    """What a page is called everywhere: its path in docs/, without suffix."""
    return page.relative_to(_docs(page)).with_suffix("").as_posix()


def address(name: str) -> str:
    """Where the site has a page: a folder."""
    return name.removesuffix("index") if Path(name).name == "index" else f"{name}/"


def notebook(page: Path) -> Path:
    """Where the repository keeps the notebook of a page."""
    return _docs(page).parent / "notebooks" / f"{name(page)}.ipynb"


def _docs(page: Path) -> Path:
    return next(folder for folder in page.parents if folder.name == "docs")


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
