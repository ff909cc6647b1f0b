"""A page builds on pages that a reader has met: they stand before it in the nav."""

import pytest

from tools import sources

from .conftest import ROOT


def misplaced(order: list[str], requires: dict[str, list[str]]) -> list[str]:
    """What pages require that does not stand before them."""
    return [
        f"{page} requires {other}"
        for place, page in enumerate(order)
        for other in requires.get(page, [])
        if other not in order[:place]
    ]


def test_a_page_requires_only_pages_before_it():
    order = [page.rpartition(".")[0] for _, page in sources.in_order()]
    heads = {
        page.relative_to(ROOT / "docs").with_suffix("").as_posix(): sources.head(page)
        for page in sources.pages()
    }
    assert set(order) == set(heads)
    assert misplaced(order, {n: h.get("requires", []) for n, h in heads.items()}) == []


@pytest.mark.parametrize("required", ["b", "c", "gone"])
def test_a_page_that_comes_later_or_not_at_all_is_found(required):
    assert misplaced(["a", "b", "c"], {"b": [required], "c": ["a"]}) == [
        f"b requires {required}"
    ]
