"""The ledger: which blocks ran, in which state of the project, and what agreed.

The tests write it; the site's gate and the stamps of the pages read it. It is worth
nothing as soon as a snippet, a tool or the lock changes: then its state is another.
A lab takes a minute or more. Its run stays good until the lab itself, a snippet or the
lock changes.
"""

import hashlib
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tools.sources import ROOT, head, is_lab, snippet

FILE = Path(".cache/ledger.json")
_STATE = [
    "snippets/**/*.py",
    "tools/**/*.*",
    "tests/**/*.py",
    "docs/assets/**/*.*",
    "docs/claims.yml",
    "conftest.py",
    "Makefile",
    "mkdocs.yml",
    "notes.md",
    "pyproject.toml",
    "requirements.txt",
]
_LAB = [
    "snippets/**/*.py",
    "requirements.txt",
    "tools/labs.py",
    "tools/kernel.py",
    "tools/notebook/**/*.*",
]


def state(root: Path = ROOT) -> str:
    """A digest of all that the outcome of a block depends on, besides its page; torch's
    version is always a part of it."""
    return _digest(root, _STATE)


def lab_state(root: Path, page: str = "") -> str:
    """A digest of all that the outcome of a lab depends on, or of any lab's."""
    return _digest(root, [*_LAB, page] if page else _LAB)


def _digest(root: Path, globs: list[str]) -> str:
    sha = hashlib.sha256(version("torch").encode())
    paths = {p for glob in globs for p in root.glob(glob) if p.is_file()}
    for path in sorted(p for p in paths if p.suffix != ".pyc"):
        sha.update(path.relative_to(root).as_posix().encode() + b"\0")
        sha.update(path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def read(root: Path = ROOT) -> dict:
    """What is known in this very state; of labs, what is still good."""
    try:
        ledger = json.loads((root / FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        ledger = {"pages": {}}
    here = state(root)
    current = ledger.get("state") == here
    good = {
        name: run
        for name, run in ledger["pages"].items()
        if (run["lab"] == lab_state(root, name) if is_lab(name) else current)
    }
    compared = ledger["comparisons"] if current else {}
    return {"state": here, "pages": good, "comparisons": compared}


def write(root: Path, pages: dict, comparisons: dict) -> None:
    """Add a run's results: what ran again replaces what was known of it."""
    ledger = read(root)
    for name, run in pages.items():
        run |= {"torch": version("torch"), "date": date.today().isoformat()}
        if is_lab(name):
            run["lab"] = lab_state(root, name)
        ledger["pages"][name] = run
    ledger["comparisons"].update(comparisons)
    path = root / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ledger, indent=1, sort_keys=True))


def stamp(page: str, ledger: dict) -> dict | None:
    """What the last run says of a page, or nothing if it has changed since."""
    run = ledger["pages"].get(page)
    if not run or run["source"] != source_digest(ROOT / page):
        return None
    name = page.removeprefix("docs/").rpartition(".")[0]
    file = Path(snippet(name, head(ROOT / page)))
    tests = f"tests/{file.parent.name}/test_{file.name}"
    return {
        "blocks": len(run["blocks"]),
        "passed": sum(block["outcome"] == "passed" for block in run["blocks"]),
        "compared": sorted(
            ledger["comparisons"].get(tests, {}).values(),
            key=lambda entry: (entry["against"], entry["dtype"]),
        ),
        "tests": tests if (ROOT / tests).exists() else None,
        "torch": run["torch"],
        "date": run["date"],
    }


def source_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
