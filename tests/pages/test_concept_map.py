"""The map shows every concept where its requirements put it."""

import re
from itertools import combinations

import pytest
from bs4 import BeautifulSoup

from tools import concept_map

from .conftest import CONCEPTS


def write(docs, **requires):
    for name, needed in requires.items():
        path = docs / "chapter" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = ", ".join(f"chapter/{other}" for other in needed)
        path.write_text(f"---\ntitle: The {name}\nrequires: [{listed}]\n---\n# T\n")
    return docs


def test_a_page_stands_right_of_all_it_requires(tmp_path):
    docs = write(tmp_path, a=[], b=["a"], c=["a", "b"], d=[])
    found = concept_map.concepts(docs)
    columns = {name[-1]: page["column"] for name, page in found.items()}
    assert columns == {"a": 0, "b": 1, "c": 2, "d": 0}


def test_an_unknown_page_is_an_error_that_names_it(tmp_path):
    docs = write(tmp_path, a=["gone"])
    with pytest.raises(ValueError, match=r"^chapter/a requires chapter/gone, which"):
        concept_map.concepts(docs)


def test_a_circle_is_an_error_that_names_its_pages(tmp_path):
    docs = write(tmp_path, a=["b"], b=["a"])
    with pytest.raises(
        ValueError, match=r"in a circle: .*chapter/a requires chapter/b"
    ):
        concept_map.concepts(docs)


def test_every_concept_is_a_link_that_says_what_it_builds_on():
    pages = concept_map.concepts()
    assert [f"docs/{name}.md" for name in pages] == CONCEPTS
    drawn = BeautifulSoup(concept_map.draw(pages, ["attention"]), "html.parser")
    links = {link["href"]: link["aria-label"] for link in drawn.select("nav a")}
    assert links.keys() == {f"{name}/" for name in pages}
    assert links["attention/dot-product/"].endswith(", start here")
    block = links["attention/transformer-block/"]
    assert "builds on Multi-head attention, Position-wise feed-forward" in block
    lines = sum(len(page["requires"]) for page in pages.values())
    assert len(drawn.select("path")) == lines


def many_pages():
    """Ten chapters of four or five concepts, each requiring a few earlier ones."""
    pages: dict[str, dict] = {}
    for n in range(45):
        names = list(pages)
        needed = [names[k] for k in {n // 2, n * 2 // 3} if n % 3 and k < n]
        column = max((pages[k]["column"] for k in needed), default=-1) + 1
        title = ["LoRA", "Scaled dot-product attention", "Linear"][n % 3]
        pages[f"chapter-{n // 5}/page-{n}"] = {
            "title": title, "requires": needed, "column": column,
        }  # fmt: skip
    return pages


def test_boxes_do_not_overlap_in_a_large_map():
    pages = many_pages()
    chapters = sorted({name.partition("/")[0] for name in pages})
    boxes, titles, width, height = concept_map.layout(pages, chapters)
    assert len(boxes) == 45 and len(titles) == 9
    for (x1, y1), (x2, y2) in combinations(boxes.values(), 2):
        apart_x = abs(x1 - x2) >= concept_map.BOX
        assert apart_x or abs(y1 - y2) > concept_map.HEIGHT
    for x, y in boxes.values():
        assert x + concept_map.BOX <= width and y + concept_map.HEIGHT <= height


def test_boxes_stand_in_the_order_of_the_navigation(tmp_path):
    docs = write(tmp_path, a=[], b=[], c=[])
    nav = "nav:\n  - chapter/c.md\n  - chapter/a.md\n  - chapter/b.md\n"
    pages = concept_map.in_reading_order(concept_map.concepts(docs), nav)
    assert [name[-1] for name in pages] == ["c", "a", "b"]


def test_lines_between_chapters_share_their_way():
    pages = {
        "one/a": {"title": "A", "requires": [], "column": 0},
        "one/b": {"title": "B", "requires": [], "column": 0},
        "two/c": {"title": "C", "requires": ["one/a", "one/b"], "column": 1},
        "two/d": {"title": "D", "requires": ["one/b"], "column": 1},
        "two/e": {"title": "E", "requires": ["one/b"], "column": 1},
    }
    drawn = concept_map.draw(pages, ["one", "two"])
    to_c, also_to_c, to_d, to_e = re.findall(r'<path d="M\d+ [\d.]+h([^"]*)"', drawn)
    assert to_c == also_to_c
    # A line from b alone is no line from a: it has a lane of its own.
    lanes = [way.partition("V")[0] for way in (to_c, to_d, to_e)]
    assert lanes[0] != lanes[1] == lanes[2]


def test_chapters_come_in_the_readers_order():
    drawn = concept_map.draw(many_pages(), ["chapter-3", "chapter-1"])
    found = re.findall(r"<text[^>]*>([^<]*)<", drawn)
    assert found[:3] == ["Chapter 3", "Chapter 1", "Chapter 0"]
