"""Every public name of the snippets: its arguments, what it does, what it agrees with.

Signatures and first lines are read from the files; what was compared, and how closely,
the ledger knows from the last run of the tests.
"""

import ast
import itertools
import re
from pathlib import Path

from tools import ledger, sources

# What a class takes over from torch's, a reader of its documentation knows.
_TORCHS = ("add_param_group", "forward", "get_extra_state", "load_state_dict",
           "set_extra_state", "state_dict", "step")  # fmt: skip


def listed() -> list[str]:
    """A chapter a heading, a file a smaller one, a name a line."""
    compared = ledger.read(Path.cwd())["comparisons"]
    lines: list[str] = []
    files = _files()
    for chapter, group in itertools.groupby(files, lambda file: files[file][0][0]):
        lines += [f"## {chapter}", ""]
        for file in group:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            about = _escaped(ast.get_docstring(tree).split("\n")[0])
            links = ", ".join(f"[{title}]({page})" for _, page, title in files[file])
            lines += [f"### {file.name}", ""]
            lines += [f"{about} [Download]({file}); the page: {links}.", ""]
            for node in tree.body:
                lines += _name(node)
            tests = compared.get(f"tests/{file.parent.name}/test_{file.name}", {})
            lines += ["", _agreement(list(tests.values())), ""]
    return lines


def _files() -> dict[Path, list[tuple[str, str, str]]]:
    """Every snippet with the pages that explain it, in the order of the pages."""
    found: dict[Path, list[tuple[str, str, str]]] = {}
    for chapter, page in sources.in_order():
        head = sources.head(Path("docs") / page)
        file = Path(sources.snippet(page.rpartition(".")[0], head))
        if file.exists():
            found.setdefault(file, []).append((chapter, page, head["title"]))
    return found


def _name(node: ast.stmt, bullet: str = "- ") -> list[str]:
    """A function, or a class and its methods, each with its line."""
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == "_":
        return []
    line = _escaped(ast.get_docstring(node).split("\n")[0])
    if isinstance(node, ast.FunctionDef):
        return [f"{bullet}`{node.name}({_arguments(node)})`: {line}"]
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    made = _arguments(methods["__init__"]) if "__init__" in methods else ""
    lines = [f"{bullet}`{node.name}({made})`: {line}"]
    for name, method in methods.items():
        if not (node.bases and name in _TORCHS):
            lines += _name(method, "    - ")
    return lines


def _arguments(node: ast.FunctionDef) -> str:
    """The arguments without their types, which the file has."""
    args = node.args
    for argument in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
        argument.annotation = None
    for several in filter(None, (args.vararg, args.kwarg)):
        several.annotation = None
    method = args.args and args.args[0].arg in ("self", "cls")
    args.args = args.args[1:] if method else args.args
    return ast.unparse(args)


def _agreement(compared: list[dict]) -> str:
    """Against what it was checked, and the largest difference."""
    if not compared:
        return ""
    said = []
    compared = sorted(compared, key=lambda run: (run["against"], run["dtype"]))
    for against, runs in itertools.groupby(compared, lambda run: run["against"]):
        closely = [f"{run['dtype']} {run['difference']:.0e}" for run in runs]
        said.append(f"`{against}` ({', '.join(closely).replace('0e+00', 'equal')})")
    return f"Checked against {'; '.join(said)}."


def _escaped(text: str) -> str:
    """Without meaning in Markdown."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([*_\[\]|$])", r"\\\1", text)
