"""A pytest plugin: what a run of the tests learns goes into the ledger at its end.

Reports bring it, from other processes too: a block's says what block it is (plugin.py),
a comparison's with what was compared and how far off that was (tests/conftest.py).
"""

import pytest

from tools import ledger


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config))


class Recorder:
    def __init__(self, config: pytest.Config):
        self.config, self.root = config, config.rootpath
        self.state = ledger.state(self.root)
        self.outcomes: dict[str, str] = {}  # by test
        self.blocks: dict[str, dict[str, dict]] = {}  # by page and test
        self.comparisons: dict[str, dict[str, dict]] = {}  # by test file and reference
        self.changed = False

    def pytest_runtest_logreport(self, report):
        node = report.nodeid
        known = self.outcomes.get(node, "passed")
        self.outcomes[node] = known if report.passed else report.outcome
        for kind, value in report.user_properties:
            if kind == "block":
                self.blocks.setdefault(value["page"], {})[node] = value
            elif kind == "compared" and report.when == "call" and report.passed:
                self.compared(node.split("::")[0], value)

    def compared(self, file: str, found: dict) -> None:
        """How often was compared with a reference, and how far off at most."""
        known = self.comparisons.setdefault(file, {})
        key = f"{found['against']} in {found['dtype']}"
        worst = known.setdefault(key, {**found, "times": 0})
        worst["times"] += 1
        worst["difference"] = max(worst["difference"], found["difference"])

    def pytest_sessionfinish(self):
        # The process that started the others writes, and only if something was run.
        if hasattr(self.config, "workerinput") or not self.outcomes:
            return
        self.changed = ledger.state(self.root) != self.state
        if not self.changed:
            ledger.write(self.root, self.pages(), self.comparisons)

    def pytest_terminal_summary(self, terminalreporter):
        if self.changed:
            terminalreporter.line(
                "The project changed meanwhile: this run is not kept."
            )

    def pages(self) -> dict[str, dict]:
        """Pages that ran from the first block to the last, and are as they were."""
        pages = {}
        for name, found in self.blocks.items():
            ordered = sorted(found.items(), key=lambda pair: pair[1]["number"])
            (_, first), *_ = ordered
            now = ledger.source_digest(self.root / name)
            if len(found) < first["of"] or now != first["source"]:
                continue
            kept = ("digest", "line", "figure", "shown")
            blocks = [
                {key: about[key] for key in kept} | {"outcome": self.outcomes[node]}
                for node, about in ordered
            ]
            pages[name] = {"source": now, "blocks": blocks}
        return pages
