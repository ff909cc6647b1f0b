"""What every run of pytest shares."""

from collections import Counter

pytest_plugins = ["tools.pages", "pytester"]  # every block of every page is a test


def pytest_terminal_summary(terminalreporter):
    """What was left out and why: one line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr for report in skipped]
    reasons = [r[2] if isinstance(r, tuple) else str(r) for r in reasons]
    for reason, count in Counter(reasons).items():
        terminalreporter.line(f"{count} left out: {reason.removeprefix('Skipped: ')}")
