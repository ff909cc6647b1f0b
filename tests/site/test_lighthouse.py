"""Lighthouse's view of the site on a slow phone."""

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
    command += [f"--chrome-flags={' '.join(FLAGS)}"]
    environment = {**os.environ, "CHROME_PATH": chromium}
    scores = {}
    for _ in range(3):  # the best of three: other work of the machine doesn't count
        subprocess.run(command, env=environment, check=True, timeout=90)
        found = json.loads(report.read_text(encoding="utf-8"))["categories"]
        for name, category in found.items():
            scores[name] = max(scores.get(name, 0), category["score"])
        if min(scores.values()) >= 0.9 and sum(scores.values()) > 3.9:
            break
    # A processor that emulates a phone while it serves the page costs some hundredths.
    assert scores.pop("performance") >= 0.9
    assert scores == {"accessibility": 1, "best-practices": 1, "seo": 1}
