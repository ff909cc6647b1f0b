"""What a page must have and may ask: a sound page passes, each fault is red."""

import pytest
from bs4 import BeautifulSoup

from tools import anatomy

SNIPPET = '"""Double (Somebody, 2000)."""\n\n\ndef double(x):\n    return 2 * x\n'
NOTES = "# Numbers\n\nTwice one is two. Twice two is\nfive.\n"
CLAIMS = """
claims:
  - {id: C01, page: chapter/page, says: Twice one is two.}
  - {id: C02, page: chapter/page, says: Twice two is five.}
no_claims:
  - because: it is a heading
    says: ["# Numbers"]
"""
PAGE = """---
title: Double
requires: []
---

# Double

A number and the same again.

- **In a line:** twice.
- **Use it when** one is not enough.
- **It costs** an addition.

## The idea

```{.python .core}
def twice(x):
    return x + x
```

??? note "The whole file"

    ```python
    --8<-- "snippets/chapter/page.py"
    ```

    ```python
    assert double(3) == twice(3)
    ```

## By hand

```figure name="page/line" lead="yes" alt="A line that climbs from nothing to two."
axes = canvas(100, 80)
axes.plot([0, double(1)])
```

## What the notes say

/// claim | C01
    verdict: holds

It is.
///

```python
assert double(1) == 2
```

/// claim | C02
    verdict: wrong

It is four.
///

Here is why.

```python
assert double(2) == 4
```

## What goes wrong

### A trap

Text.

## Try it yourself

Text.

## Sources

Text.
"""


@pytest.fixture
def home(house):
    house.write("snippets/chapter/page.py", SNIPPET)
    house.write("docs/assets/figures/page/line.svg", "<svg></svg>")
    house.write("notes.md", NOTES)
    house.write("docs/claims.yml", CLAIMS)
    return house


def built(home, page: str) -> BeautifulSoup:
    home.write("docs/chapter/page.md", page)
    home.build()
    html = (home.site / "chapter/page/index.html").read_text(encoding="utf-8")
    return BeautifulSoup(html, "html.parser")


def faults(home, page: str) -> str:
    html = built(home, page)
    return "\n".join(anatomy.check(html, "chapter/page", True, home.root))


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("```{.python .core}", "```python", "no block is its core"),
        ("    return x + x", "    return x + x\n" * 12, "a core of 13 lines, at most"),
        ("def twice", "def double", "the file overwrites what the core defines"),
        ('--8<-- "snippets/chapter/page.py"', "x = 2", "page.py does not stand in a"),
        ("assert double(3) == twice(3)", "assert twice(3) == 6", "that it agrees with"),
        ("assert double(3) == twice(3)", "assert double(3) == 6", "that it agrees"),
        ("assert double(3) == twice(3)", "y = double(twice(3))", "that it agrees with"),
        (' lead="yes"', "", "no figure opens it"),
        ("- **It costs** an addition.\n", "", "a list of 3 lines before the first"),
        ("## By hand", "## By foot", "its sections are not"),
        ("### A trap\n", "### A trap\n\nText.\n\n" * 5, "5 traps, at most 4"),
        ("A number and", "word " * 650, "words of prose, at most 650"),
        ("assert double(1) == 2", "x = double(1)", "C01: no assertion stands below it"),
        ("Here is why.", "### Elsewhere", "C02: no assertion stands below it"),
        ("Here is why.", "> Twice two is six.", "“Twice two is six.”"),
        ("C02\n    verdict: wrong", "C01\n    verdict: wrong", "does not belong here"),
    ],
)  # fmt: skip
def test_a_fault_is_red(home, old, new, fault):
    assert PAGE.count(old) == 1
    edited = PAGE.replace(old, new)
    if "belong" in fault:
        home.write("docs/notes.md", "[NOTES]\n")
        home.write("docs/chapter/page.md", edited)
        with pytest.raises(ValueError, match=fault):
            home.build()
    else:
        assert fault in faults(home, edited)


def test_a_page_may_name_the_file_that_it_shares_with_another(home):
    home.write("snippets/chapter/shared.py", f"# Shared.\n{SNIPPET}")
    page = PAGE.replace("requires: []", "requires: []\nsnippet: chapter/shared")
    assert "shared.py does not stand in a fold" in faults(home, page)
    assert faults(home, page.replace("chapter/page.py", "chapter/shared.py")) == ""


def test_an_edited_copy_of_the_snippet_is_not_the_file(home):
    copy = SNIPPET.replace("2 * x", "x * 2").replace("\n", "\n    ").rstrip()
    page = PAGE.replace('--8<-- "snippets/chapter/page.py"', copy)
    assert "page.py does not stand in a fold, whole" in faults(home, page)


def test_a_claim_that_is_not_judged_or_has_no_verdict_is_red(home):
    page = PAGE.replace("/// claim | C02\n    verdict: wrong\n\nIt is four.\n///\n", "")
    assert "claim C02 is not judged" in faults(home, page)
    page = PAGE.replace("verdict: wrong", "verdict: maybe")
    assert "claim C02 is not judged" in faults(home, page)


@pytest.mark.parametrize(
    "option, left",
    [("    unproven: history\n", ""), ("", "no assertion stands below")],
)
def test_a_claim_that_nothing_can_prove_says_why(home, option, left):
    page = PAGE.replace("verdict: wrong\n", f"verdict: wrong\n{option}")
    page = page.replace("assert double(2) == 4", "x = double(2)")
    found = faults(home, page)
    assert (left in found) if left else found == ""


def test_claims_that_follow_one_another_share_a_proof(home):
    page = PAGE.replace("```python\nassert double(1) == 2\n```\n\n", "")
    assert faults(home, page) == ""


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("notes.md", "five.\n", "five. Thrice is more.\n", "'Thrice is more'"),
        ("notes.md", "Twice one", "Two times one", "the notes say 0 times"),
        ("notes.md", "# Numbers", "Twice one is two.", "the notes say 2 times"),
        ("docs/claims.yml", "one is two.", "one is 2.", "the notes say 0 times"),
        ("docs/claims.yml", "says: Twice one", "says: one", "neither judged nor"),
        (
            "docs/claims.yml",
            "Twice two is",
            "two. Twice two is",
            "quotes twice: 'two.'",
        ),
    ],
)
def test_a_word_that_is_not_judged_or_not_in_the_notes_fails_the_build(
    home, file, old, new, fault
):
    home.write("docs/notes.md", "# N\n\n[NOTES]\n")
    text = {"notes.md": NOTES, "docs/claims.yml": CLAIMS}[file]
    assert text.count(old) == 1
    home.write(file, text.replace(old, new))
    home.write("docs/chapter/page.md", "# P\n")
    with pytest.raises(ValueError, match=fault):
        home.build()


def test_the_annotated_notes_are_whole_and_every_mark_leads_to_its_claim(home):
    home.write("docs/notes.md", "# N\n\n[NOTES]\n")
    assert faults(home, PAGE) == ""
    notes = (home.site / "notes/index.html").read_text(encoding="utf-8")
    html = BeautifulSoup(notes, "html.parser")
    marks = [(mark.get_text(), mark["href"]) for mark in html.select("a.mark")]
    to_two = "../chapter/page/#c02"
    assert marks == [
        ("Twice one is two.", "../chapter/page/#c01"),
        ("Twice two is", to_two),
        ("five.", to_two),
    ]
    labels = [label.get_text() for label in html.select("small[data-verdict]")]
    assert labels == ["✓ holds", "✗ wrong"]
    for mark in html.select("small[data-verdict]"):
        mark.decompose()
    assert "Twice one is two. Twice two is five." in " ".join(html.get_text().split())


def test_folds_code_quotations_and_sources_are_no_prose(home):
    counted = anatomy.words(built(home, PAGE))
    more = PAGE.replace("A number and the", "A number and and the")
    more = more.replace("x + x", "x + x + 0").replace(
        "double(3) ==", "double(3) + 0 =="
    )
    more += "\nMore text."
    assert anatomy.words(built(home, more)) == counted + 1
