"""Run code as it runs where it is pasted: an empty folder, torch, and nothing else.

An interpreter of its own (`python -I`) refuses every installed package but torch, what
torch itself needs, and what a page says it needs. isolated_driver.py runs in it.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

DRIVER = Path(__file__).with_name("isolated_driver.py")


class Interpreter:
    """A process that has imported torch, and forks a child for each program."""

    def __init__(self, needs: tuple[str, ...] = ()):
        allowed = _with_requirements({"torch", *needs})
        forbidden = [
            module
            for module, owners in packages_distributions().items()
            if not {_normal(owner) for owner in owners} & allowed
            and module not in sys.stdlib_module_names
        ]
        quiet = ["-W", "ignore:Failed to initialize NumPy"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", *quiet, DRIVER, *forbidden],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()  # nothing more to do: it ends

    def run(self, blocks: list[str], files: dict[str, str] | None = None) -> dict:
        """Run a program, given in blocks, in a folder of just these files.

        Returns:
            `printed`: by each block; `error`: a traceback or None; `stderr`: warnings,
            for example; `left`: files beside the given ones; `changed`: what of the
            state of torch and Python is no longer as it was.
        """
        task = {"blocks": blocks, "files": files or {}}
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def _with_requirements(names: set[str]) -> set[str]:
    found: set[str] = set()
    todo = {_normal(name) for name in names}
    while todo:
        name = todo.pop()
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        for line in needed:
            if "extra ==" not in line:
                todo |= {_normal(re.match(r"[\w.-]+", line)[0])} - found
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
