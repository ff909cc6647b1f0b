"""Planted faults: each must turn its gate red, or the gate is not one."""

import json
import re

import pytest
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tools import gate, ledger, notebooks

from .conftest import ROOT

SHAPES = {
    "python": "```python\nCODE\n```\n",
    "py": "```py\nCODE\n```\n",
    "python3": "```python3\nCODE\n```\n",
    "a capital": "```Python\nCODE\n```\n",
    "python2": "```python2\nCODE\n```\n",
    "numpy": "```numpy\nCODE\n```\n",
    "a title": '```python title="a.py"\nCODE\n```\n',
    "highlighted lines": '```python hl_lines="1" linenums="1"\nCODE\n```\n',
    "attributes": "```{.python .wide #here}\nCODE\n```\n",
    "braces and a space": '```{ .py title="a.py" }\nCODE\n```\n',
    "a space before the language": "``` python\nCODE\n```\n",
    "a leading space": " ```python\n CODE\n ```\n",
    "tildes": "~~~python\nCODE\n~~~\n",
    "four backticks": "````python\nCODE\n````\n",
    "a tab": '=== "Tab"\n\n    ```python\n    CODE\n    ```\n',
    "a tab in an admonition": (
        '!!! note\n\n    === "Tab"\n\n        ```py\n        CODE\n        ```\n'
    ),
    "an admonition": "!!! note\n\n    ```python\n    CODE\n    ```\n",
    "folded details": "??? note\n\n    ```python\n    CODE\n    ```\n",
    "a list": "1. One\n\n    ```python\n    CODE\n    ```\n",
    "a list in a list": (
        "- One\n    - Two\n\n        ```python\n        CODE\n        ```\n"
    ),
    "a footnote": "Text.[^1]\n\n[^1]: Note\n\n    ```py\n    CODE\n    ```\n",
    "a part of HTML": "<div markdown>\n\n```python\nCODE\n```\n\n</div>\n",
    "details in a list": (
        "1. One\n\n    ??? note\n\n        ```py\n        CODE\n        ```\n"
    ),
    "a quotation": "> ```python\n> CODE\n> ```\n",
    "front matter": "---\ntitle: T\n---\n```python\nCODE\n```\n",
    "an include": '```python\n--8<-- "code.py"\n```\n',
    "an included section": '```python\n--8<-- "section.py:part"\n```\n',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_failure_is_seen_in(house, shape):
    code = "value = 1\n\nassert value == 2, 'planted'"
    house.write("code.py", code)
    house.write("section.py", f"# --8<-- [start:part]\n{code}\n# --8<-- [end:part]\n")
    house.page(_shaped(shape, code))
    result = house.test()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*planted*", "*assert 1 == 2*"])
    assert "did not pass: failed" in house.gate()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sound_block_passes_the_gate_in(house, shape):
    code = "value = 1\n\nassert value == 1"
    house.write("code.py", code)
    house.write("section.py", f"# --8<-- [start:part]\n{code}\n# --8<-- [end:part]\n")
    house.page(_shaped(shape, code))
    house.test().assert_outcomes(passed=1)
    assert house.gate() == ""


def _shaped(shape: str, code: str) -> str:
    lines = []
    for line in SHAPES[shape].split("\n"):
        before, mark, _ = line.partition("CODE")
        if mark:
            lines += [(before + part).rstrip() for part in code.split("\n")]
        else:
            lines.append(line)
    return "\n".join(lines)


def test_a_failure_names_the_page_line_then_the_snippet_line(house):
    house.write("snippets/a.py", "def divide(x):\n    return 1 / x\n")
    house.page(
        '# P\n\n```python\n--8<-- "snippets/a.py"\n```\n\n```python\ndivide(0)\n```\n'
    )
    result = house.test()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            '*File "docs/page.md", line 8, in <module>*',
            "*divide(0)*",
            '*File "snippets/a.py", line 2, in divide*',
            "*ZeroDivisionError: division by zero*",
        ]
    )


def test_blocks_after_a_failing_one_count_as_not_run(house):
    house.page("```python\nx = 1\nassert x == 2\n```\n\n```python\ny = x\n```\n")
    result = house.test("-rs")
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*not run: the block at line 1 failed*"])
    assert "(line 6) did not pass: skipped" in house.gate()


def test_a_block_that_leaves_python_ends_its_page(house):
    house.page("```python\nraise SystemExit(0)\n```\n\n```python\ny = 1\n```\n")
    house.test().assert_outcomes(failed=1, skipped=1)
    assert "(line 5) did not pass: skipped" in house.gate()


def test_a_block_picked_by_hand_runs_the_ones_before_it(house):
    house.page("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n")
    house.test(what="docs/page.md::line 5").assert_outcomes(passed=1)


def test_what_is_left_out_is_said_in_one_line(house):
    skipped = '<!--pytest.mark.skip(reason="no luck")-->\n\n```python\nx = 1\n```\n\n'
    house.page(3 * skipped)
    house.write("conftest.py", (ROOT / "conftest.py").read_text(encoding="utf-8"))
    result = house.test()
    said = [line for line in result.outlines if "no luck" in line]
    assert said == ["3 left out: no luck"]


def test_a_skipped_block_does_not_pass_the_gate(house):
    house.page("<!--pytest.mark.skip-->\n\n```python\nx = 1\n```\n")
    house.test().assert_outcomes(skipped=1)
    assert "did not pass: skipped" in house.gate()


def test_pages_share_nothing(house):
    spoil = """
    ```python
    import os, random, warnings, torch
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)
    torch.set_num_threads(2); torch.manual_seed(5); random.seed(5)
    torch.set_printoptions(precision=1)
    torch.set_float32_matmul_precision("medium"); torch.autocast("cpu").__enter__()
    os.environ["LEAK"] = "1"; os.chdir("/"); warnings.simplefilter("ignore")
    leak = 1
    ```
    """
    sound = """
    ```python
    import os, random, torch, warnings
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.get_num_threads() == 1 and torch.initial_seed() == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.is_autocast_enabled("cpu")
    assert "LEAK" not in os.environ and os.getcwd() != "/"
    assert "leak" not in globals() and str(torch.tensor(1 / 3)) == "tensor(0.3333)"
    caught = False
    try:
        warnings.warn("loud")
    except UserWarning:
        caught = True
    assert caught
    ```
    """
    house.write("docs/a.md", spoil)
    house.write("docs/b.md", sound)
    house.test().assert_outcomes(passed=2)


def test_a_warning_fails_its_block(house):
    house.page("```python\nimport warnings\nwarnings.warn('old')\n```\n")
    result = house.test()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*UserWarning: old*"])


def test_a_block_that_takes_too_long_fails(house):
    house.page("---\ntime_limit: 0.3\n---\n```python\nwhile True:\n    x = 1\n```\n")
    result = house.test()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["docs/page.md:4: Timeout*"])
    assert "make outputs" not in result.stdout.str()


@pytest.mark.parametrize("code", ["1 + 1", "# nothing", "len([])"])
def test_a_block_that_does_nothing_fails(house, code):
    house.page(f"```python\n{code}\n```\n")
    result = house.test()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*prints nothing, asserts nothing, defines nothing*"])


def test_source_and_pickles_of_what_a_page_defines_can_be_had(house):
    house.page(
        """
        ```python
        x = 1
        ```

        ```python
        import inspect, pickle

        class Point:
            '''A point.'''
            def __init__(self, x):
                self.x = x

        def double(x):
            return 2 * x
        ```

        ```python
        assert inspect.getsource(double) == "def double(x):\\n    return 2 * x\\n"
        assert inspect.getsource(Point).startswith("class Point:\\n")
        assert pickle.loads(pickle.dumps(Point(3))).x == 3
        ran = False
        if __name__ == "__main__":
            ran = True
        assert ran
        ```
        """
    )
    house.test().assert_outcomes(passed=3)


OUTPUT = "<!--pytest-codeblocks:expected-output-->\n\n```text\nSHOWN\n```\n"


def test_a_stale_output_fails_and_can_be_rewritten(house):
    house.page("```python\nprint(1 + 1)\n```\n\n" + OUTPUT.replace("SHOWN", "3"))
    result = house.test()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*the page shows*", "3", "*but the block prints*", "2"]
    )
    house.test("--write-outputs").assert_outcomes(passed=1)
    assert "```text\n2\n```" in (house.root / "docs/page.md").read_text()
    house.test().assert_outcomes(passed=1)
    assert house.gate() == ""


def test_an_output_in_a_list_is_rewritten_in_place(house):
    text = "1. One\n\n    ```python\n    print('a')\n    print('b')\n    ```\n\nEnd.\n"
    house.page(text)
    house.test().assert_outcomes(failed=1)  # it prints, and nothing is shown
    house.test("--write-outputs").assert_outcomes(passed=1)
    house.test().assert_outcomes(passed=1)
    written = (house.root / "docs/page.md").read_text()
    assert "    ```text\n    a\n    b\n    ```\n\nEnd.\n" in written


def test_an_output_edited_after_the_tests_is_caught(house):
    house.page("```python\nprint(2)\n```\n\n" + OUTPUT.replace("SHOWN", "2"))
    house.test().assert_outcomes(passed=1)
    house.page("```python\nprint(2)\n```\n\n" + OUTPUT.replace("SHOWN", "3"))
    assert "an output that was not compared: 3" in house.gate()


def test_an_output_under_something_that_does_not_run_is_refused(house):
    house.page("```sh\nls\n```\n\n" + OUTPUT)
    result = house.test()
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*an output is shown under a block that is not run*"])


def test_a_page_is_one_program_so_cont_is_refused(house):
    house.page(
        "```text\na\n```\n\n<!--pytest-codeblocks:cont-->\n\n```python\n1 / 0\n```\n"
    )
    result = house.test()
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*`cont` has no place*"])


def test_a_page_edited_after_the_tests_is_caught(house):
    house.page("```python\nx = 1\n```\n")
    house.test()
    house.page("```python\nx = 2\n```\n")
    faults = house.gate()
    assert "the block 'x = 2' was never run in this state" in faults
    assert "line 1: ran, but the page does not show it" in faults


def test_a_page_edited_elsewhere_than_in_its_code_is_caught(house):
    one = "```python\nprint(1)\n```\n\n" + OUTPUT.replace("SHOWN", "1")
    two = "```python\nprint(2)\n```\n\n" + OUTPUT.replace("SHOWN", "2")
    house.page(one + "\n" + two)
    house.test().assert_outcomes(passed=2)
    assert house.gate() == ""
    swapped = (one + "\n" + two).replace("text\n1", "text\n3")
    swapped = swapped.replace("text\n2", "text\n1").replace("text\n3", "text\n2")
    for edited in (
        two + "\n" + one,  # the order of the blocks
        swapped,  # outputs that were compared, each under the other's block
        one + "\n```python\nprint(2)\n```\n",  # an output is gone
    ):
        house.page(edited)
        assert "edited after its blocks ran" in house.gate()


def test_a_snippet_edited_after_the_tests_is_caught(house):
    house.write("snippets/a.py", "x = 1\n")
    house.page('```python\n--8<-- "snippets/a.py"\n```\n')
    house.test().assert_outcomes(passed=1)
    assert house.gate() == ""
    house.write("snippets/a.py", "x = 2\n")
    assert "was never run in this state" in house.gate()


def test_a_new_lock_asks_for_a_new_run(house):
    house.page("```python\nx = 1\n```\n")
    house.test()
    assert house.gate() == ""
    house.write("requirements.txt", "torch==3\n")
    assert "was never run in this state" in house.gate()


@pytest.mark.parametrize("target", ["nowhere.py", "a.py:nosection"])
def test_an_include_of_something_missing_is_red(house, target):
    house.write("a.py", "x = 1\n")
    house.page(f'```python\n--8<-- "{target}"\n```\n')
    assert house.test().ret != 0
    with pytest.raises(Exception, match="could not be"):
        house.build()


@pytest.mark.parametrize(
    "page, fault",
    [
        ('```python\n--8<-- "a.py" \n```\n', "include"),  # a space after it
        ('--8<--"a.py"\n', "include"),  # no space before it
        ("```python title=a.py\nx = 1\n```\n", "fence"),  # no quotes
        ("```python notest\nx = 1\n```\n", "fence"),
        ("~~~python title=a.py\nx = 1\n~~~\n", "fence"),
        ("<pre><code>x = 1</code></pre>\n", "code outside a fence"),
        ("```pycon\n>>> 1\n1\n```\n", "a block of pycon"),
        ("```pytb\nTraceback (most recent call last):\n```\n", "a block of pytb"),
        ("```python-console\n>>> 1\n```\n", "a block of python-console"),
        ("```console\n$ ls\nfile\n```\n", "a block of console"),
        ("```bash\nls\n```\n", "a block of bash"),
        ("```sh\nls\n```\n", "a block of sh"),
        ('```json\n{"loss": 0.1}\n```\n', "a block of json"),
        ("```cython\nx = 1\n```\n", "a block of cython"),
        ("````markdown\n```python\nx = 1\n```\n````\n", "a block of markdown"),
        ("<pre>loss 0.1</pre>\n", "code outside a fence"),
        ("<p>It says <samp>0.1</samp>.</p>\n", "code outside a fence"),
        ("<textarea>x = 1</textarea>\n", "code outside a fence"),
        ("<p><code>x = 1<br>y = 2</code></p>\n", "code of several lines"),
        (
            '<svg viewBox="0 0 9 9"><path d="M0 0h9"/></svg>\n',
            "a picture that no block",
        ),
        ('<p><img src="curve.png" alt="A curve."></p>\n', "a picture that no block"),
        ("```text\n2\n```\n", "an output that was not compared"),
        ("```python\n```\n", "empty"),
        ("/// nothing | C01\n    a: b\n\nText\n///\n", "a block that is not one"),
    ],
)
def test_what_the_generator_swallows_is_red(house, page, fault):
    house.write("a.py", "x = 1\n")
    house.page("# P\n\nText.\n\n" + page)
    house.test()
    assert fault in house.gate()


def test_a_wrong_formula_fails_the_build_and_is_named(house, caplog):
    house.page(r"$$ \frac{a}{ $$")
    with pytest.raises(Exception, match=r"formula.*frac.*is not TeX"):
        house.build()
    assert "page.md" in caplog.text


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nowhere", "#nowhere"])
def test_a_dead_link_or_anchor_fails_the_build(house, link):
    house.page(f"# P\n\n[dead]({link})\n")
    with pytest.raises(Abort):
        house.build()


def test_a_figure_is_an_output_like_any_other(house):
    fence = '```figure name="page/a" alt="A line that ends at VALUE."\nCODE\n```\n'
    draw = "axes = canvas(100, 80)\naxes.plot([0, height])"

    def page(height):
        code = f"```python\nheight = {height}\n```\n\n"
        house.page(code + fence.replace("CODE", draw).replace("VALUE", str(height)))

    page(1)
    house.test().assert_outcomes(passed=1, failed=1)  # not drawn yet
    house.test("--write-outputs").assert_outcomes(passed=2)
    house.test().assert_outcomes(passed=2)
    assert house.gate() == ""
    page(2)
    house.test().assert_outcomes(passed=1, failed=1)


FIGURE = """```python
height = 0.2
```

```figure name="page/a" alt="ALT" caption="CAPTION"
axes = canvas(100, 80)
axes.plot([0, height])
axes.text(0, 0.1, f"top {height}")
```
"""


@pytest.fixture
def figure(house):
    """A house with one drawn figure; draw(old, new) edits what is stored."""
    house.page(FIGURE)
    house.test("--write-outputs").assert_outcomes(passed=2)
    house.test().assert_outcomes(passed=2)
    assert house.gate() == ""
    return house.root / "docs/assets/figures/page/a.svg"


@pytest.mark.parametrize(
    "old, new",
    [
        (r"top 0\.2", "top 0.3"),  # a number that is read
        (r">0\.2<", ">0.1<"),  # of an axis
        (r"0 0 100 80", "0 0 101 80"),
        (r'd="M [\d.]+ ', 'd="M 4 '),  # a mark, elsewhere
    ],
)
def test_an_edited_drawing_fails_its_block_and_the_gate(house, figure, old, new):
    svg = figure.read_text()
    edited = re.sub(old, new, svg, count=1)
    assert edited != svg
    figure.write_text(edited)
    assert "was never run in this state" in house.gate()
    house.test().assert_outcomes(passed=1, failed=1)
    house.test("--write-outputs")
    assert figure.read_text() == svg


def test_another_processors_last_digit_of_a_coordinate_is_none_of_our_business(
    house, figure
):
    svg = figure.read_text()
    figure.write_text(svg.replace(*_first_coordinate(svg, 0.1), 1))
    house.test().assert_outcomes(passed=2)


def _first_coordinate(svg: str, by: float) -> tuple[str, str]:
    path = re.search(r'<path d="M ([\d.]+) ', svg)
    return path[0], f'<path d="M {float(path[1]) + by:.1f} '


@pytest.mark.parametrize("place", ["ALT", "CAPTION"])
def test_a_number_in_a_caption_or_alternative_text_stands_in_the_code_too(house, place):
    for said, fault in [("It ends at 0.2.", ""), ("It ends at 0.3.", "says 0.3: no")]:
        house.page(FIGURE.replace(place, said))
        house.test("--write-outputs")
        house.test()
        assert fault in house.gate() and bool(house.gate()) == bool(fault)


def test_an_output_is_compared_with_its_spaces(house):
    comment = "<!--pytest-codeblocks:expected-output-ignore-whitespace-->"
    house.page(f"```python\nprint('12 3')\n```\n\n{comment}\n\n```text\n1 23\n```\n")
    result = house.test()
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*an output is compared with its spaces*"])


@pytest.mark.parametrize(
    "file",
    [
        "docs/assets/figures/page/a.svg",
        "docs/claims.yml",
        "notes.md",
        "mkdocs.yml",
        "pyproject.toml",
        "conftest.py",
        "Makefile",
        "tools/theme/main.html",
    ],
)
def test_what_a_run_depends_on_asks_for_a_new_one_when_edited(house, file):
    house.page("```python\nx = 1\n```\n")
    house.test()
    assert house.gate() == ""
    before = (house.root / file).read_text() if (house.root / file).exists() else ""
    house.write(file, before + "\n# edited\n" * (file != "notes.md"))
    if file == "notes.md":
        house.write(file, "\n")
    assert "was never run in this state" in house.gate()


def test_another_torch_asks_for_a_new_run(house, monkeypatch):
    house.page("```python\nx = 1\n```\n")
    house.test()
    monkeypatch.setattr(ledger, "version", lambda package: "3.0.0")
    assert "was never run in this state" in house.gate()


@pytest.mark.parametrize("name", ["extra.html", "extra.ipynb", "chapter/data.csv"])
def test_a_file_that_is_no_page_is_not_published_unseen(house, name):
    house.write(f"docs/{name}", "loss 0.1")
    assert f"{name}: nobody has looked at it" in house.gate()


def test_published_weights_have_the_digest_that_they_are_named_after(house):
    named = house.root / "docs/assets/a-ba7816bf.pt"  # of "abc"
    named.parent.mkdir(exist_ok=True)
    named.write_bytes(b"abc")
    assert "a-ba7816bf.pt" not in house.gate()
    named.write_bytes(b"abd")
    assert "assets/a-ba7816bf.pt: not what it is named after" in house.gate()


PUBLISHED = """---
requires: []
---
# P

```python
print(1)
```

<!--pytest-codeblocks:expected-output-->

```text
1
```
"""


@pytest.mark.parametrize("suffix", [".md", ".ipynb", ".py"])
def test_what_a_reader_takes_along_is_the_page(house, suffix):
    house.page(PUBLISHED)
    house.test("--write-outputs")
    house.build()
    config = load_config(str(house.root / "mkdocs.yml"))
    made = notebooks.Cells(house.root / "docs/page.md", config)
    text = {".md": made.markdown(), ".ipynb": made.notebook(), ".py": made.script()}
    (house.site / f"page{suffix}").write_text(text[suffix])
    unseen = f"page{suffix}: not what it is made of"
    assert unseen not in "\n".join(gate.check(house.site, house.root))
    (house.site / f"page{suffix}").write_text(text[suffix].replace("1", "2"))
    assert unseen in "\n".join(gate.check(house.site, house.root))


def test_a_published_graph_is_the_one_that_was_compared(house, figure):
    house.build()
    built = house.site / "assets/figures/page/a.svg"
    built.parent.mkdir(parents=True)
    built.write_text(figure.read_text().replace("top 0.2", "top 0.3"))
    assert "page/a.svg: not what it is made of" in "\n".join(
        gate.check(house.site, house.root)
    )


@pytest.mark.parametrize("header", ['name="page/a"', 'alt="An alternative."'])
def test_a_figure_without_name_or_text_alternative_is_red(house, header):
    house.page(f"```figure {header}\naxes = canvas(100, 80)\n```\n")
    assert house.test().ret != 0
    with pytest.raises(Exception, match="a figure needs"):
        house.build()


def test_an_unknown_formula_or_claim_word_never_reaches_a_page(house):
    house.page("# P\n\n/// claim | C99\n    verdict: holds\n\nText.\n///\n")
    with pytest.raises(ValueError, match="C99"):
        house.build()


def test_the_ledger_of_another_state_counts_for_nothing(house):
    house.page("```python\nx = 1\n```\n")
    house.test()
    assert ledger.read(house.root)["pages"]
    house.write("snippets/new.py", "")
    assert ledger.read(house.root)["pages"] == {}


def test_several_processes_keep_one_ledger(house):
    house.page("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n")
    house.write("docs/other.md", "```python\nassert False, 'planted'\n```\n")
    house.test("-n", "2", "--dist", "loadfile").assert_outcomes(passed=2, failed=1)
    pages = ledger.read(house.root)["pages"]
    outcomes = {
        name: [b["outcome"] for b in run["blocks"]] for name, run in pages.items()
    }
    assert outcomes == {
        "docs/page.md": ["passed", "passed"], "docs/other.md": ["failed"],
    }  # fmt: skip
    assert "docs/other.md: the block" in house.gate()


def test_collecting_alone_leaves_ledger_and_page_as_they_are(house):
    house.page("---\nrequires: []\n---\n# P\n\n```python\nprint(1)\n```\n")
    house.test()
    kept = house.root / ledger.FILE
    before = kept.read_text(), (house.root / "docs/page.md").read_text()
    house.write("snippets/new.py", "")  # another state, of which nothing is known
    house.test("--collect-only", "--write-outputs")
    assert (kept.read_text(), (house.root / "docs/page.md").read_text()) == before
    assert not (house.root / "notebooks").exists()


def test_outputs_are_not_rewritten_by_several_processes(house):
    house.page("```python\nprint(1)\n```\n")
    result = house.test("-n", "2", "--write-outputs")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("file", ["snippets/new.py", "docs/page.md"])
def test_a_run_that_the_project_changed_under_is_not_kept(house, file):
    path = house.root / file
    house.write("snippets/old.py", "")
    change = f"from pathlib import Path\n\nPath({str(path)!r}).write_text('')"
    house.page(f"```python\n{change}\n```\n")
    result = house.test()
    result.assert_outcomes(passed=1)
    assert ledger.read(house.root)["pages"] == {}
    if file.startswith("snippets"):
        result.stdout.fnmatch_lines(["The project changed meanwhile*"])


def test_the_search_index_and_the_file_for_models_are_of_the_pages(house):
    house.page(PUBLISHED)
    house.test("--write-outputs")
    house.test()
    house.build()
    config = load_config(str(house.root / "mkdocs.yml"))
    index = house.site / "search/search_index.json"
    known = json.loads(index.read_text())
    pages = sorted((house.root / "docs").glob("*.md"))
    texts = [notebooks.Cells(page, config).markdown() for page in pages]
    everything = house.site / "llms-full.txt"
    everywhere = notebooks.SEPARATOR.join(texts)

    def faults(entry="P", text=everywhere) -> str:
        entries = [{**doc, "text": entry} for doc in known["docs"][-1:]]
        index.write_text(json.dumps({**known, "docs": entries}))
        everything.write_text(text)
        found = gate.check(house.site, house.root)
        return "\n".join(
            fault for fault in found if fault.startswith(("search", "llms"))
        )

    assert faults() == ""
    assert "doesn't say 'Q'" in faults(entry="Q")
    assert faults(text=texts[0]) == "llms-full.txt: not the pages"
