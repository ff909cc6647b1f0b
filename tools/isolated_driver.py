"""The inside of isolated.py: runs by path where nothing of this project is at hand.

Its arguments are the packages that it refuses. It reads a task a line from its input
and answers each in a line. Importing torch takes a second, and happens once: a program
runs in a child that is forked after it.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import traceback
import types
from importlib import machinery
from pathlib import Path

FORBIDDEN = {*sys.argv[1:]}


class Allowed(machinery.PathFinder):
    """Finds what is installed, but for what is forbidden."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name.partition(".")[0] in FORBIDDEN:
            return None
        return super().find_spec(name, path, target)


def main() -> None:
    sys.meta_path = [machinery.BuiltinImporter, machinery.FrozenImporter, Allowed]
    sys.dont_write_bytecode = True
    sys.path.insert(0, "")  # where it is, as when Python is typed at
    torch = importlib.import_module("torch")
    # Private, and for speed only: optimizers import it, here once, not in each child.
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer")
            child = os.fork()
            if child == 0:
                run(json.loads(line), torch, answer)
                os._exit(0)  # not exit(): what is above belongs to the parent
            _, status = os.waitpid(child, 0)
            died = {"printed": [], "error": f"it died, with status {status}"}
            text = answer.read_text() if answer.exists() else json.dumps(died)
            print(text, flush=True)


def run(task: dict, torch, answer: Path) -> None:
    """One program, in a folder of its own; all about it is written to `answer`."""
    stderr = answer.with_name("stderr")
    for descriptor in (1, 2):
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    folder = answer.with_name("folder")
    folder.mkdir()
    os.chdir(folder)
    for name, text in task["files"].items():
        Path(name).write_text(text, encoding="utf-8")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    torch.manual_seed(1)  # not the seed of the tests: pages must set their own
    before, printed, error = state(torch), [], None
    try:
        for block in task["blocks"]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = compile(block, "<pasted>", "exec", dont_inherit=True)
                exec(code, module.__dict__)
            printed.append(out.getvalue())
    except BaseException:  # SystemExit too
        error = traceback.format_exc()
    after = state(torch)
    sys.stderr.flush()
    result = {
        "printed": printed,
        "error": error,
        "stderr": stderr.read_text(),
        "left": sorted({path.name for path in folder.iterdir()} - {*task["files"]}),
        "changed": [name for name in before if before[name] != after[name]],
    }
    answer.write_text(json.dumps(result))


def state(torch) -> dict:
    return {
        "random numbers": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
    }


if __name__ == "__main__":
    main()
