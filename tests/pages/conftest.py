"""The pages there are, and a small house to plant faults in."""

import textwrap
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tools import gate, sources

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page.relative_to(ROOT).as_posix() for page in sources.pages()]
CONCEPTS = [page for page in PAGES if sources.has_notebook(ROOT / page)]
SHORT = [page for page in PAGES if not sources.is_lab(page)]  # labs take too long

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
EXTENSIONS = CONFIG[CONFIG.index("markdown_extensions:") :]
SETTINGS = CONFIG[CONFIG.index("exclude_docs:") : CONFIG.index("extra_css")]


class House:
    """A small project with the real plugin, extensions and gate."""

    def __init__(self, pytester):
        self.pytester = pytester
        self.root = pytester.path
        self.site = self.root / "site"
        # MkDocs' own theme: templates are not what is tested here.
        config = (
            f"site_name: Canary\nsite_url: https://canary.org/\n{SETTINGS}{EXTENSIONS}"
        )
        self.write("mkdocs.yml", config)
        self.write("docs/index.md", "# Home\n")
        self.write("notes.md", "")
        self.write("docs/claims.yml", "claims: []\nno_claims: []\n")
        self.write("requirements.txt", "")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def page(self, text: str) -> None:
        self.write("docs/page.md", text)

    def test(self, *options, what="docs"):
        return self.pytester.runpytest_inprocess(
            "-p", "tools.plugin", "-p", "tools.recorder", what, *options
        )

    def build(self) -> None:
        build(load_config(str(self.root / "mkdocs.yml"), strict=True))

    def gate(self) -> str:
        self.build()
        return "\n".join(gate.check(self.site, self.root))


@pytest.fixture
def house(pytester):
    return House(pytester)
