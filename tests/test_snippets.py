"""What every snippet promises: it can be copied alone, and it reads well."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = sorted((ROOT / "snippets").rglob("*.py"))
every_snippet = pytest.mark.parametrize(
    "path", SNIPPETS, ids=[f"{path.parent.name}/{path.name}" for path in SNIPPETS]
)

# One isolated interpreter for all files, because importing torch takes a second: for
# each file it forks a child, which imports a copy from an otherwise empty folder.
IMPORT_EACH_ALONE = """
import builtins, importlib.util, os, shutil, sys, tempfile, traceback
import torch

def only_torch_and_the_standard_library(name, scope=None, *rest):
    importer, package = (scope or {}).get("__name__"), name.partition(".")[0]
    if importer == "alone" and package not in {"torch", *sys.stdlib_module_names}:
        raise ImportError(f"{name!r} is neither torch nor the standard library")
    return import_anything(name, scope, *rest)

def state():
    return (
        torch.get_rng_state().tolist(), torch.get_default_dtype(),
        torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
        dict(os.environ), list(sys.path), os.getcwd(),
    )

def check(file):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        copy = shutil.copy(file, folder)
        spec = importlib.util.spec_from_file_location("alone", copy)
        module = sys.modules["alone"] = importlib.util.module_from_spec(spec)
        before = state()
        spec.loader.exec_module(module)
        assert state() == before, "importing it changes the state of torch or Python"
        assert os.listdir() == [os.path.basename(file)], "importing it leaves files"

torch.set_num_threads(1)
sys.dont_write_bytecode = True
import_anything, builtins.__import__ = (
    builtins.__import__, only_torch_and_the_standard_library
)
for file in sys.argv[1:]:
    print(f"--- {file}", flush=True)
    if os.fork() == 0:
        try:
            check(file)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def printed():
    """What importing each snippet prints, tracebacks and warnings included."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_EACH_ALONE, *map(str, SNIPPETS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=60,
    )
    _, *parts = re.split(r"^--- (.*)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def public_definitions(tree):
    """Functions and classes, and the methods of those, that a reader may use."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def test_there_are_snippets():
    assert SNIPPETS


@every_snippet
def test_copied_alone_it_imports_silently_and_changes_nothing(path, printed):
    assert printed[str(path)] == ""


@every_snippet
def test_it_imports_torch_and_the_standard_library_only(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    packages = {name.partition(".")[0] for name in names}
    assert packages <= {"torch", *sys.stdlib_module_names}


@every_snippet
def test_it_fits_a_page(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 88


@every_snippet
def test_it_says_what_it_is_and_where_it_comes_from(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    # "Concept (authors, year, section)." and then one or two sentences
    assert re.match(r"\S[^\n]* \([^()\n]*\b(19|20)\d\d\b[^()\n]*\)\.\n\n\S", docstring)


@every_snippet
def test_everything_public_has_a_docstring(path):
    definitions = list(public_definitions(ast.parse(path.read_text())))
    assert definitions
    assert [node.name for node in definitions if not ast.get_docstring(node)] == []


@every_snippet
def test_everything_has_type_hints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = "self", "cls"
            bare = [a.arg for a in arguments if not a.annotation and a.arg not in own]
            assert not bare, f"{node.name}: {bare}"
            assert node.returns, f"{node.name} says not what it returns"
