"""What every snippet promises: it can be copied alone, and it reads well."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = sorted((ROOT / "snippets").rglob("*.py"))
# Of code, without docstrings, comments alone and blank lines. The cache brings the
# decoder that it is a part of: copied alone, neither could be tried.
MOST_LINES, MORE_LINES = 90, {"kv_cache/cache.py": 150}
every_snippet = pytest.mark.parametrize(
    "path", SNIPPETS, ids=[f"{path.parent.name}/{path.name}" for path in SNIPPETS]
)


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
def test_copied_alone_it_imports_silently_and_changes_nothing(path, isolated):
    result = isolated([f"import {path.stem}"], files={path.name: path.read_text()})
    silently = {"printed": [""], "error": None, "stderr": "", "left": [], "changed": []}
    assert result == silently


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
    text = path.read_text()
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    code = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, documented):
            code.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, documented[1:]):
            code.update(range(node.lineno, node.body[0].lineno))
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            docstring = node.body[0]
            code -= set(range(docstring.lineno, docstring.end_lineno + 1))
    name = path.relative_to(ROOT / "snippets").as_posix()
    assert len(code) <= MORE_LINES.get(name, MOST_LINES)
    assert max(map(len, text.splitlines())) <= 88


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
