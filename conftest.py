"""What every run of pytest shares."""

from collections import Counter

import pytest

from tools import weights

weights.from_this_tree()  # for pages, and for the interpreters that tests start
# Every block of every page is a test.
pytest_plugins = ["tools.plugin", "tools.recorder", "pytester"]


def pytest_terminal_summary(terminalreporter):
    """What was left out and why: one line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr for report in skipped]
    reasons = [r[2] if isinstance(r, tuple) else str(r) for r in reasons]
    for reason, count in Counter(reasons).items():
        terminalreporter.line(f"{count} left out: {reason.removeprefix('Skipped: ')}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays with one process, but pages are pasted wherever there is time."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        # Named like something private, but xdist documents it as what to override.
        def _split_scope(self, nodeid):
            spread = nodeid.startswith("tests/pages/test_paste.py")
            return nodeid if spread else super()._split_scope(nodeid)

    return Scheduling(config, log)
