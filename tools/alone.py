"""Run code as it runs where it is pasted: an empty folder, torch, and nothing else.

The interpreter is isolated (`python -I`) and refuses every installed package but torch,
what torch itself needs, and what a page says it needs.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

_DRIVER = """
import contextlib, importlib.machinery as machinery, io, json, os, sys, tempfile
import traceback
task = json.load(sys.stdin)

class NotForbidden(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name.partition(".")[0] in task["forbidden"]:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [machinery.BuiltinImporter, machinery.FrozenImporter, NotForbidden]
import torch, torch._dynamo  # the optimizers import it: once, not once a page
torch.set_num_threads(1)

def run(blocks):
    printed = []
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "<pasted>", "exec", dont_inherit=True), namespace)
        printed.append(out.getvalue())
    return printed

def child(blocks, report):
    torch.manual_seed(1)  # not the seed of the tests: pages must set their own
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            result = {"printed": run(blocks), "error": None}
        except BaseException:
            result = {"printed": [], "error": traceback.format_exc()}
        os.chdir("/")
    with open(report, "w") as file:
        json.dump(result, file)

running = 0
with tempfile.TemporaryDirectory() as reports:
    for n, blocks in enumerate(task["programs"].values()):
        if running == os.cpu_count():
            os.wait()
            running -= 1
        running += 1
        if os.fork() == 0:
            child(blocks, f"{reports}/{n}")
            os._exit(0)
    while running:
        os.wait()
        running -= 1
    for n, name in enumerate(task["programs"]):
        if os.path.exists(f"{reports}/{n}"):
            with open(f"{reports}/{n}") as file:
                print(json.dumps([name, json.load(file)]))
"""


def run(programs: dict[str, list[str]], needs: tuple[str, ...] = ()) -> dict[str, dict]:
    """Run programs, each a list of blocks, each in a process of its own.

    Returns:
        for each program what its blocks printed, and the traceback if one failed.
    """
    allowed = _with_requirements({"torch", *needs})
    forbidden = [
        module
        for module, owners in packages_distributions().items()
        if not {_normal(owner) for owner in owners} & allowed
        and module not in sys.stdlib_module_names
    ]
    task = {"programs": programs, "forbidden": forbidden}
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-W",
            "ignore:Failed to initialize NumPy",
            "-c",
            _DRIVER,
        ],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    results = dict(map(json.loads, done.stdout.splitlines()))
    for name in programs:
        results.setdefault(name, {"printed": [], "error": done.stderr or "it died"})
    return results


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
