"""The ledger: which blocks ran, in which state of the project, and what agreed.

The tests write it; the site's gate and the stamps of the pages read it. It is worth
nothing as soon as a snippet, a tool or the lock changes: then its state is another.
"""

import hashlib
import json
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(".cache/ledger.json")
_STATE = ["snippets/**/*.py", "tools/*.py", "tests/**/*.py", "requirements.txt"]


def state(root: Path = ROOT) -> str:
    """A digest of all that the outcome of a block depends on, besides its page."""
    sha = hashlib.sha256()
    for path in sorted({p for glob in _STATE for p in root.glob(glob)}):
        sha.update(path.relative_to(root).as_posix().encode() + b"\0")
        sha.update(path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def read(root: Path = ROOT) -> dict:
    """The ledger of this very state, or an empty one."""
    try:
        ledger = json.loads((root / FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        ledger = {}
    if ledger.get("state") == state(root):
        return ledger
    return {"state": state(root), "pages": {}, "comparisons": {}}


def write(root: Path, pages: dict, comparisons: dict, torch_version: str) -> None:
    """Add a run's results: what ran again replaces what was known of it."""
    ledger = read(root)
    ledger["pages"].update(pages)
    ledger["comparisons"].update(comparisons)
    ledger |= {"torch": torch_version, "date": date.today().isoformat()}
    path = root / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ledger, indent=1, sort_keys=True))


def stamp(page: str) -> dict | None:
    """What the last run says of a page, or nothing if it has changed since."""
    ledger = read()
    run = ledger["pages"].get(page)
    if not run or run["source"] != source_digest(ROOT / page):
        return None
    chapter, _, name = page.removeprefix("docs/").removesuffix(".md").rpartition("/")
    tests = f"tests/{chapter}/test_{name}.py".replace("-", "_")
    return {
        "blocks": len(run["blocks"]),
        "passed": sum(block["outcome"] == "passed" for block in run["blocks"]),
        "compared": sorted(
            ledger["comparisons"].get(tests, {}).values(),
            key=lambda entry: (entry["against"], entry["dtype"]),
        ),
        "tests": tests if (ROOT / tests).exists() else None,
        "torch": ledger["torch"],
        "date": ledger["date"],
    }


def source_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
