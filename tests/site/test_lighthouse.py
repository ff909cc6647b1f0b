"""Lighthouse's view of the site on a phone, but for what depends on the machine."""

import json
import os
import subprocess

import pytest

from ..conftest import FLAGS, leave_out
from .conftest import ROOT, every_page

LIGHTHOUSE = ROOT / ".cache/checkers/node_modules/.bin/lighthouse"


@pytest.mark.parametrize("page", ["", "attention/dot-product/"])
def test_lighthouse_is_content(request, page, chromium, port, base_path, tmp_path):
    if not every_page(request.config):
        pytest.skip("Lighthouse belongs to make site")
    if not LIGHTHOUSE.exists():
        leave_out("no Lighthouse: make checkers")
    report = tmp_path / "report.json"
    command = [str(LIGHTHOUSE), f"http://localhost:{port}{base_path}{page}", "--quiet"]
    command += ["--output=json", f"--output-path={report}"]
    # Performance is no test: it measures how busy the machine is that emulates a phone.
    command += ["--only-categories=accessibility,best-practices,seo"]
    command += [f"--chrome-flags={' '.join(FLAGS)}"]
    environment = {**os.environ, "CHROME_PATH": chromium}
    subprocess.run(command, env=environment, check=True, timeout=120)
    found = json.loads(report.read_text(encoding="utf-8"))["categories"]
    assert {name: category["score"] for name, category in found.items()} == {
        "accessibility": 1,
        "best-practices": 1,
        "seo": 1,
    }
