"""The pages there are."""

from pathlib import Path

from tools import ledger, takeaway

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md"))
CONCEPTS = [page for page in PAGES if takeaway.has_notebook(ROOT / page)]
SHORT = [page for page in PAGES if not ledger.is_lab(page)]  # labs take too long
