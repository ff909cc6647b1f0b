"""The code keeps to the house style, in the tests as everywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.blocks import Scanner

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["check"], ["format", "--check", "--diff"]])
def test_ruff_has_no_complaint(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_fits_88_columns(page):
    blocks = Scanner.of(ROOT / "mkdocs.yml").blocks(ROOT / page)
    fences = [f for block in blocks for f in (block.fence, block.shown) if f]
    long = [line for f in fences for line in f.code.split("\n") if len(line) > 88]
    assert long == []
