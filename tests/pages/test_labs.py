"""Labs are run by mkdocs-jupyter, rendered by the site, compared with what is kept."""

import ast
import sys
from importlib.metadata import packages_distributions

import nbformat
import pytest
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, PluginError
from nbclient.exceptions import CellExecutionError

from tools import gate, labs, ledger, sources
from tools.notebooks import Cells

from .conftest import PAGES, ROOT

LAB = """\
# ---
# title: A lab
# description: It doubles.
# ---

# %% [markdown]
# # A lab
#
# A formula, $x^2$, and a [link](../index.md).

# %%
import matplotlib.pyplot as plt
from tqdm import tqdm

from snippets.double import double

for x in tqdm([1, 2]):
    print(double(x))

# %% name="line" alt="A line that climbs from left to right."
_, axes = plt.subplots(figsize=(2, 1))
axes.plot([0, double(1)])
axes.set_title("climbs")

# %% results="yes"
print("| What | Paper | There | Here | Seeds |")
print("| --- | --- | --- | --- | --- |")
print(f"| doubling | Somebody 2000 | twice | {double(1)} times | 5 |")
"""
PLUGIN = f"""
hooks: [{ROOT}/tools/labs.py]
plugins:
  - mkdocs-jupyter:
      include: ["labs/*.py"]
      ignore: ["*.md"]
      execute: !ENV [LABS, false]
      allow_errors: false
"""


@pytest.fixture
def house(house, monkeypatch):
    config = (house.root / "mkdocs.yml").read_text(encoding="utf-8")
    house.write("mkdocs.yml", config + PLUGIN)
    house.write("snippets/double.py", "def double(x):\n    return 2 * x\n")
    house.write("docs/labs/lab.py", LAB)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's
    monkeypatch.setenv("IPYTHONDIR", "")  # so that it is set back
    return house


@pytest.fixture
def build(house, monkeypatch):
    def run(execute=True, write=False) -> str:
        monkeypatch.setenv("LABS", str(execute).lower())
        monkeypatch.setenv("OUTPUTS", "write" if write else "")
        return house.gate()

    return run


@pytest.fixture
def refuses(build, caplog):
    """refuses(fault): the build stops, and says so."""

    def check(fault: str) -> None:
        caplog.clear()
        with pytest.raises((Abort, CellExecutionError)) as stopped:
            build()
        assert fault in caplog.text + str(stopped.value)

    return check


def test_a_lab_is_run_kept_compared_and_shown(house, build, refuses, monkeypatch):
    stored = house.root / "notebooks/labs/lab.ipynb"
    svg = house.root / "docs/assets/figures/labs/lab/line.svg"
    page = house.site / "labs/lab/index.html"
    refuses("line.svg is not what the lab draws now")
    assert build(write=True) == ""
    kept = nbformat.read(stored, as_version=4)
    assert "def double(x):" in kept.cells[1].source  # it runs alone
    assert "snippets" not in kept.cells[1].source
    assert kept.cells[1].outputs[0].text == "2\n4\n"  # and no bar of progress

    shown = page.read_text(encoding="utf-8")
    assert "<math" in shown and 'href="../../"' in shown  # the site's own Markdown
    assert (
        "from snippets.double import double"
        in gate.BeautifulSoup(shown, "html.parser").get_text()
    )
    assert shown.count("<svg") == 1 and "var(--figure-1)" in shown
    page.write_text(shown.replace("2\n4", "2\n5"), encoding="utf-8")
    faults = "\n".join(gate.check(house.site, house.root))
    assert "an output that was not compared: 2" in faults

    page.write_text(shown.replace("2 times", "3 times"), encoding="utf-8")
    faults = "\n".join(gate.check(house.site, house.root))
    assert "a table of results that no lab printed" in faults

    # Nothing changed: what ran is still good, here and without running it.
    ran = ledger.read(house.root)["pages"]["docs/labs/lab.py"]
    assert build() == "" and build(execute=False) == ""
    assert page.read_text(encoding="utf-8") == shown
    assert ledger.read(house.root)["pages"]["docs/labs/lab.py"] == ran

    # What is kept was edited: red, though the lab need not run.
    before = stored.read_text(encoding="utf-8")
    stored.write_text(before.replace("2\\n4", "2\\n5"), encoding="utf-8")
    refuses("lab.ipynb is not what the lab gives now")
    stored.write_text(before, encoding="utf-8")
    drawn = svg.read_text(encoding="utf-8")
    svg.write_text(drawn.replace("climbs", "falls"), encoding="utf-8")
    refuses("line.svg is not what the lab draws now")
    svg.write_text(drawn, encoding="utf-8")

    # Another torch, another lab, another snippet: it has to run again.
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "version", lambda package: "3.0.0")
        assert "was never run in this state" in build(execute=False)
    house.write("tools/new.py", "")  # a new tool: labs need not run again
    assert build(execute=False) == ""
    house.write("docs/labs/lab.py", LAB.replace("[1, 2]", "[1, 3]"))
    assert "was never run in this state" in build(execute=False)
    house.write("docs/labs/lab.py", LAB)
    house.write("snippets/double.py", "def double(x):\n    return 3 * x\n")
    assert "was never run in this state" in build(execute=False)
    refuses("is not what the lab")


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ('"climbs"', 'r"$\\frac{$"', "plt.subplots(figsize=(2, 1))' failed"),
        ("[1, 2]", "[1, 1 / 0]", "division by zero"),
        (' results="yes"', "", "no table of results"),
        ("| There ", "| Where ", "no table of results, or not its columns"),
    ],
    ids=["when its figure is drawn", "when it runs", "without results", "columns"],
)
def test_a_cell_that_fails_is_red(house, refuses, old, new, fault):
    assert LAB.count(old) == 1
    house.write("docs/labs/lab.py", LAB.replace(old, new))
    refuses(fault)


def cell(**about):
    made = nbformat.v4.new_code_cell("x = 1", execution_count=1)
    made.update(about)
    return made


@pytest.mark.parametrize(
    "about, fault",
    [
        ({"execution_count": None}, "the cell 'x = 1' was not run"),
        (
            {"outputs": [nbformat.v4.new_output("error", traceback=["Oh."])]},
            "the cell 'x = 1' failed:\nOh.",
        ),
        (
            {"outputs": [nbformat.v4.new_output("stream", name="stderr", text="Hm.")]},
            "the cell 'x = 1' warns:\nHm.",
        ),
        (
            {"outputs": [nbformat.v4.new_output("execute_result")]},
            "the cell 'x = 1' has a value: print it",
        ),
    ],
)
def test_what_the_plugin_lets_pass_is_red(about, fault, tmp_path):
    labs._check(cell(), tmp_path / "lab.py")
    with pytest.raises(PluginError, match=fault):
        labs._check(cell(**about), tmp_path / "lab.py")


def test_the_results_page_has_the_tables_of_all_labs(house, build):
    nav = "nav: [index.md, {Labs: [results.md, labs/lab.py]}]\n"
    config = (house.root / "mkdocs.yml").read_text(encoding="utf-8")
    house.write("mkdocs.yml", nav + config)
    house.write("docs/results.md", "# Results\n\n[RESULTS]\n")
    build(write=True)
    assert build() == ""
    shown = (house.site / "results/index.html").read_text(encoding="utf-8")
    assert '<a href="../labs/lab/">A lab</a>' in shown
    assert "<td>2 times</td>" in shown and "seconds on one of" in shown


every_lab = pytest.mark.parametrize("page", [p for p in PAGES if sources.is_lab(p)])


@every_lab
def test_a_lab_imports_only_what_it_says_it_needs_and_runs_alone(page):
    """Running its notebook would take as long as the lab: names are checked instead."""
    needs = sources.head(ROOT / page)["needs"]
    cells = [c for c in labs.read(ROOT / page) if c.cell_type == "code"]
    pasted = "\n".join(labs.inlined(c.source) for c in cells)
    imported, defined = set(), {}
    for node in ast.walk(ast.parse(pasted)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    for node in ast.parse(pasted).body:  # no file may overwrite what another defines
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.unparse(node)
            assert defined.setdefault(node.name, text) == text, node.name
    owners = packages_distributions()
    known = {"torch", *sys.stdlib_module_names}
    assert {owners[name][0] for name in imported - known} == set(needs)


@every_lab
def test_what_is_kept_of_a_lab_is_of_its_cells(page):
    made = Cells(ROOT / page, load_config(str(ROOT / "mkdocs.yml")))
    stored = ROOT / f"notebooks/{made.name}.ipynb"
    assert stored.read_text(encoding="utf-8") == made.notebook(), "make outputs"
