"""MkDocs hooks: a lab is a notebook that mkdocs-jupyter runs and the site renders.

A lab is a file in percent format in docs/labs/. The plugin's template hands its cells
on as JSON; here they become Markdown, which the site renders as it does any page. With
LABS=true a lab is run, anew exactly if it, a snippet, the lock, these files or torch's
version changed; what it printed and drew is held against what the repository keeps
(notebooks/labs/, docs/assets/figures/labs/), or stored there with OUTPUTS=write.
Without, what is kept is shown, and nobody waits.
"""

import ast
import json
import os
import platform
import re
import textwrap
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page
from mkdocs_jupyter.config import settings  # undocumented: where templates are

from tools import figures, ledger, results, sources, weights
from tools.blocks import digest

KERNEL = """
c.Application.log_level = 40
c.IPKernelApp.log_level = 40
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": None}
c.IPKernelApp.exec_lines = ["import tools.kernel"]
"""


def on_config(config):
    plugin = config.plugins["mkdocs-jupyter"]
    settings.templates_dir = str(Path(__file__).parent / "notebook")
    # Its cache knows the lab only; what a lab imports is in the name of the folder.
    run = plugin.config["execute"]
    state = ledger.lab_state(Path(config.config_file_path).parent)
    plugin.config["cache_dir"] = f".cache/labs/{state}-{run}"
    profile = Path(".cache/ipython/profile_default")
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text(KERNEL)
    os.environ["IPYTHONDIR"] = str(profile.parent.resolve())
    weights.from_this_tree()
    return config


def on_page_markdown(markdown, page, config, files):
    if sources.is_lab(page.file.src_uri):
        # The search shows the page that explains before the one that measures.
        page.meta = {
            **sources.head(Path(page.file.abs_src_path)),
            "search": {"boost": 0.3},
        }
    return markdown


def on_page_content(html, page, config, files):
    """Render the cells that the plugin's template handed on."""
    if not sources.is_lab(page.file.src_uri):
        return html
    path = Path(page.file.abs_src_path)
    script = re.search(r"<script[^>]*>(.*)</script>", html, re.S)
    cells = _cells(nbformat.from_dict(json.loads(script[1])))
    if config.plugins["mkdocs-jupyter"].config["execute"]:
        for cell in cells:
            _check(cell, path)
        found = [cell for cell in cells if cell.metadata.get("results")]
        if [results.columns(printed(cell)) for cell in found] != [results.COLUMNS]:
            raise PluginError(f"{path.name}: no table of results, or not its columns")
        _compare(cells, path, config)
        _remember(cells, path, config)
    else:
        cells = kept(path)
    page.markdown = "\n\n".join(_markdown(cell, path) for cell in cells)
    Page.render(page, config, files)
    return page.content


def read(lab: Path) -> list:
    """The cells of a lab as it is written, without outputs."""
    return _cells(jupytext.read(lab))


def kept(lab: Path) -> list:
    """The cells of a lab with the outputs that the repository keeps of them."""
    cells = read(lab)
    stored = sources.notebook(lab)
    if stored.exists():
        old = nbformat.read(stored, as_version=4).cells
        old = [cell for cell in old if cell.cell_type == "code"]
        new = [cell for cell in cells if cell.cell_type == "code"]
        for cell, known in zip(new, old, strict=False):
            cell.outputs = known.outputs
    return cells


def ran(lab: Path) -> dict:
    """How long the run took that the repository keeps, and where it was."""
    stored = sources.notebook(lab)
    known = nbformat.read(stored, as_version=4).metadata if stored.exists() else {}
    return known.get("ran", {})


def _run(cells: list) -> dict:
    """How long these cells took, and where."""
    times = [
        datetime.fromisoformat(time)
        for cell in cells
        for time in cell.metadata.get("execution", {}).values()
    ]
    cores = f"one of {os.cpu_count()} cores ({platform.machine()})"
    seconds = round((max(times) - min(times)).total_seconds())
    return {"seconds": seconds, "machine": cores, "torch": version("torch")}


def _cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type != "raw"]  # its head


def _check(cell, lab: Path) -> None:
    """Refuse what the plugin lets pass: errors, warnings, cells that did not run."""
    if cell.cell_type != "code":
        return
    first = cell.source.split("\n")[0]
    if cell.get("execution_count") is None:
        raise PluginError(f"{lab.name}: the cell '{first}' was not run")
    for output in cell.outputs:
        if output.output_type == "error":
            said = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output.traceback))
            raise PluginError(f"{lab.name}: the cell '{first}' failed:\n{said}")
        if output.output_type == "stream" and output.name == "stderr":
            raise PluginError(f"{lab.name}: the cell '{first}' warns:\n{output.text}")
        # The page would not show it; what draws returns its marks, which are seen.
        if output.output_type == "execute_result" and not cell.metadata.get("name"):
            raise PluginError(f"{lab.name}: the cell '{first}' has a value: print it")


def printed(cell) -> str:
    """What a cell printed."""
    streams = [o for o in cell.get("outputs", []) if o.output_type == "stream"]
    return "".join("".join(output.text) for output in streams)


def drawn(cell) -> list[str]:
    """What a cell drew, as matplotlib wrote it."""
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    return ["".join(d["image/svg+xml"]) for d in data if "image/svg+xml" in d]


def figure(cell, lab: Path) -> Path | None:
    """Where the figure of a cell is kept; its metadata names it and describes it."""
    if not (name := cell.metadata.get("name")):
        return None
    if not cell.metadata.get("alt"):
        raise PluginError(f"{lab.name}: the figure {name} has no alt")
    return figures.FOLDER / "labs" / lab.stem / f"{name}.svg"


def _compare(cells: list, lab: Path, config) -> None:
    """Hold what was printed and drawn against what is kept, or keep it."""
    from tools import notebooks

    write = os.environ.get("OUTPUTS") == "write"
    for cell in cells:
        path, svgs = figure(cell, lab), drawn(cell)
        if bool(path) != bool(svgs) or len(svgs) > 1:
            raise PluginError(f"{lab.name}: {len(svgs)} drawings of a figure {path}")
        for svg in svgs:
            svg = figures.tidy(svg, f"{lab.stem}-{path.stem}")
            if not write and not figures.same(path, svg):
                raise PluginError(f"{path} is not what the lab draws now: make outputs")
            if write and not figures.same(path, svg):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(svg)
    made, stored = notebooks.Cells(lab, config, cells), sources.notebook(lab)
    if write:
        if not made.ran or stored.read_text("utf-8") != made.notebook():
            made.ran = _run(cells)
        notebooks.store(made)
    elif not stored.exists() or stored.read_text("utf-8") != made.notebook():
        raise PluginError(f"{stored} is not what the lab gives now: make outputs")


def _remember(cells: list, lab: Path, config) -> None:
    """Note in the ledger what ran."""
    blocks = [
        {
            "digest": digest(cell.source),
            "line": cell.source.split("\n")[0],
            "figure": False,
            "shown": digest(_shown(cell)) if printed(cell) else None,
            "outcome": "passed",
        }
        for cell in cells
        if cell.cell_type == "code"
    ]
    root = Path(config.config_file_path).parent
    name = lab.relative_to(root).as_posix()
    run = {"source": ledger.source_digest(lab), "blocks": blocks}
    if (known := ledger.read(root)["pages"].get(name)) and known["blocks"] == blocks:
        return  # it ran before, and nothing changed
    ledger.write(root, {name: run}, {})


def _shown(cell) -> str:
    """What the page shows of what a cell printed: of a table, its words."""
    text = printed(cell)
    return results.words(text) if cell.metadata.get("results") else text


def _markdown(cell, lab: Path) -> str:
    """A cell as the site's Markdown: code, what it printed, what it drew."""
    if cell.cell_type != "code":
        return cell.source
    parts = [f"```python\n{cell.source}\n```"]
    if cell.metadata.get("results"):
        code = textwrap.indent(parts[0], "    ")
        parts = [results.table(printed(cell)), f'??? note "The code"\n\n{code}']
    elif text := printed(cell).rstrip():
        parts.append(f"```text\n{text}\n```")
    text = "\n\n".join(parts)
    if path := figure(cell, lab):
        options = {key: cell.metadata.get(key) for key in ("alt", "caption", "lead")}
        text += "\n\n" + figures.place(path, digest(cell.source), options)
    return text


def inlined(code: str) -> str:
    """The code of a cell with the text of the snippets in place of their imports."""
    lines = code.split("\n")
    for node in reversed(ast.parse(code).body):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("snippets."):
            file = Path(node.module.replace(".", "/") + ".py")
            text = file.read_text(encoding="utf-8").rstrip()
            lines[node.lineno - 1 : node.end_lineno] = [*text.split("\n"), "", ""]
    return "\n".join(lines).rstrip()
