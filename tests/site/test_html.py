"""The finished HTML: valid, linked, named and described."""

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from ..conftest import leave_out
from .conftest import ROOT

VNU = ROOT / ".cache/checkers/node_modules/vnu-jar/build/dist/vnu.jar"
# What the checker says in vain, by its exact words.
TOLERATED = [
    # MathML Core lets every element have it; the checker knows MathML 3.
    r"Attribute “(scriptlevel|displaystyle)” not allowed on element “(mtable|mrow)”",
    r"Attribute “tabindex” not allowed on element “mtr”",
    # Two check boxes of its base template say autocomplete="off"; browsers ignore it.
    r"Attribute “autocomplete” is only allowed when the input type is “color”",
]


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def dead_links(site: Path, base: str) -> list[str]:
    """Links to files or anchors that the site doesn't have."""
    html = {path: soup(path) for path in pages(site)}
    anchors = {
        p: {tag["id"] for tag in page.select("[id]")} for p, page in html.items()
    }
    faults = []
    for path, page in html.items():
        here = urljoin(base, path.relative_to(site).as_posix())
        for tag in page.select("[href], [src]"):
            link = tag.get("href") or tag.get("src") or ""
            target = urljoin(here, link)
            if not target.startswith(base):
                continue
            parts = urlsplit(target)
            file = site / unquote(parts.path).removeprefix(urlsplit(base).path)
            file = file / "index.html" if file.is_dir() else file
            fragment = unquote(parts.fragment)
            if not file.is_file() or (
                fragment and fragment not in anchors.get(file, ())
            ):
                faults.append(f"{path.relative_to(site)}: {link}")
    return faults


def test_every_link_and_anchor_exists(site, base):
    assert dead_links(site, base) == []


@pytest.mark.parametrize("link", ["gone/", "#gone", "other.html#gone", "/x/gone.css"])
def test_a_dead_link_is_found(link, tmp_path):
    (tmp_path / "index.html").write_text(f'<p id="here"><a href="{link}">x</a>')
    (tmp_path / "other.html").write_text('<p id="there"><a href="./#here">x</a>')
    assert dead_links(tmp_path, "http://localhost/x/") == [f"index.html: {link}"]


def validate(files: list[Path]) -> list[str]:
    """What the Nu HTML checker says, without what we tolerate."""
    if not VNU.exists() or not shutil.which("java"):
        leave_out("no HTML checker: Java and make checkers")
    command = ["java", "-jar", str(VNU), "--errors-only", "--format", "gnu"]
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, check=False
    )
    said = done.stderr.splitlines()
    return [line for line in said if not any(re.search(m, line) for m in TOLERATED)]


def test_every_page_is_valid(site):
    assert validate(pages(site)) == []


def test_an_invalid_page_is_found(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(
        "<!doctype html><html lang=en><title>x</title><p id=x><b id=x>x</b>"
    )
    (fault,) = validate([page])
    assert "Duplicate ID" in fault


def test_every_page_says_what_it_is(site):
    titles = {}
    for path in pages(site):
        html, name = soup(path), path.relative_to(site).as_posix()
        assert html.html["lang"] == "en", name
        meta = {
            tag.get("name") or tag.get("property"): tag for tag in html.select("meta")
        }
        for key in (
            "description",
            "og:title",
            "og:description",
            "og:site_name",
            "viewport",
        ):
            assert meta[key]["content"].strip(), f"{name}: {key}"
        assert len(html.select("h1")) == 1, name
        title = html.title.get_text()
        assert title not in titles, f"{name} and {titles[title]} are both '{title}'"
        titles[title] = name


def test_titles_and_descriptions_come_from_the_front_matter(site):
    html = soup(site / "attention/dot-product/index.html")
    source = (ROOT / "docs/attention/dot-product.md").read_text(encoding="utf-8")
    title = re.search(r"^title: (.*)", source, re.M)[1]
    about = re.search(r"^description: (.*)", source, re.M)[1]
    assert html.title.get_text().startswith(title)
    assert html.select_one("meta[name=description]")["content"] == about
    assert html.select_one("meta[property='og:title']")["content"] == title


def test_every_figure_has_a_name(site):
    for path in pages(site):
        for drawing in soup(path).select("figure:not(.live) svg, figure img"):
            name = drawing.get("aria-label") or drawing.get("alt") or ""
            assert len(name) > 20, f"{path.relative_to(site)}: {str(drawing)[:80]}"


def test_no_page_loads_anything_from_elsewhere(site):
    for path in pages(site):
        html = soup(path)
        loads = [t["src"] for t in html.select("[src]")]
        loads += [t["href"] for t in html.select("link:not([rel=canonical])")]
        outside = [url for url in loads if urlsplit(url).netloc]
        assert outside == [], path.relative_to(site)
