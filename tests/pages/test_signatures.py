"""The page of snippets has every public name, with its own arguments."""

import importlib
import inspect
import re
import subprocess
import sys

from tools import signatures

from .conftest import ROOT

LISTED = signatures.listed()


def test_every_snippet_is_listed_once():
    files = [line.removeprefix("### ") for line in LISTED if line.startswith("### ")]
    assert sorted(files) == sorted(f.name for f in ROOT.glob("snippets/*/*.py"))


def test_every_public_name_stands_there_with_its_arguments():
    calls = re.findall(r"^- `(\w+)\((.*)\)`: .", "\n".join(LISTED), re.M)
    said = {
        name: re.findall(r"(?:^|, )\*{0,2}([a-z]\w*)(?=[,=]|$)", arguments)
        for name, arguments in calls
    }
    known = {}
    for file in ROOT.glob("snippets/*/*.py"):
        module = importlib.import_module(f"snippets.{file.parent.name}.{file.stem}")
        for name, made in vars(module).items():
            code = inspect.isclass(made) or inspect.isfunction(made)
            if code and name[0] != "_" and made.__module__ == module.__name__:
                known[name] = list(inspect.signature(made).parameters)
    assert said == known and len(calls) == len(known)


def test_methods_that_torch_does_not_name_stand_under_their_class():
    place = next(n for n, line in enumerate(LISTED) if line.startswith("- `KVCache("))
    below = [line.split("(")[0] for line in LISTED[place + 1 : place + 5]]
    assert below[:3] == ["    - `nbytes", "    - `update", "    - `crop"]
    assert below[3].startswith("- `CausalSelfAttention")
    assert "    - `forward" not in "\n".join(LISTED)
    place = next(n for n, line in enumerate(LISTED) if "`EarlyStopping(" in line)
    assert LISTED[place + 1].startswith("    - `step(")  # its own, not an optimizer's


def test_a_build_does_not_wait_for_torch():
    code = "import sys, tools.hooks, tools.live; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_marks_and_signs_of_a_docstring_mean_nothing_in_markdown():
    assert signatures._escaped("|a_1 * b| < c & d") == r"\|a\_1 \* b\| &lt; c &amp; d"
