"""Run the blocks of a page as one program, as a reader who pastes them would.

Every page starts from the same state and leaves none behind. Its namespace is a real
`__main__` module whose source can be found, so that `inspect.getsource`, pickling and
a main guard work. Tracebacks name the file and line that the author wrote.
"""

import ast
import builtins
import contextlib
import linecache
import os
import random
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator

import torch
from pytest_codeblocks.main import stdout_io  # undocumented: its own blocks use it

from tools.blocks import Block, Origin


class Program:
    def __init__(self, page: str, rewrite: Callable[[ast.Module, bytes, str], None]):
        self.filename = f"<{page}>"
        self.rewrite = rewrite
        self.module = types.ModuleType("__main__")
        self.module.__file__ = self.filename
        self.module.__builtins__ = builtins
        self.lines: list[str] = []
        self.origins: list[Origin] = []

    def run(self, block: Block, extra: dict | None = None) -> str:
        """Run one block and return what it printed."""
        offset = len(self.lines)
        lines = block.code.split("\n")[:-1]
        self.lines += [line + "\n" for line in lines]
        self.origins += block.fence.origins
        source = "".join(self.lines)
        linecache.cache[self.filename] = (len(source), None, self.lines, self.filename)
        tree = ast.parse("\n" * offset + block.code, self.filename)
        self.rewrite(tree, source.encode(), self.filename)
        code = compile(tree, self.filename, "exec", dont_inherit=True)
        namespace = self.module.__dict__
        before = {name: id(value) for name, value in namespace.items()}
        extra = extra or {}
        namespace.update(extra)
        try:
            with stdout_io() as stdout, warnings.catch_warnings():
                warnings.simplefilter("error")
                exec(code, namespace)
        finally:
            for name in extra:
                namespace.pop(name, None)
        defined = {
            name
            for name, value in namespace.items()
            if not name.startswith("@") and before.get(name) != id(value)
        }
        if not (stdout.getvalue() or defined or extra or asserts(block.code)):
            raise EmptyBlock(
                "this block prints nothing, asserts nothing, defines nothing"
            )
        return stdout.getvalue()

    def locate(self, filename: str, line: int) -> Origin | None:
        """The author's file and line for one of this program's, or nothing."""
        return self.origins[line - 1] if filename == self.filename else None

    def explain(self, error: BaseException) -> str:
        """The traceback with the authors' files and lines in place of ours."""
        report = traceback.TracebackException.from_exception(error)
        seen = [report]
        for part in seen:
            seen += [p for p in (part.__cause__, part.__context__) if p is not None]
            part.stack = traceback.StackSummary.from_list(self._own(part.stack))
            if isinstance(error, SyntaxError) and part.filename == self.filename:
                part.filename, line = self.origins[int(part.lineno) - 1]
                part.lineno = str(line)
        return "".join(report.format()).rstrip()

    def _own(self, stack) -> list[traceback.FrameSummary]:
        frames = list(stack)
        while frames and frames[0].filename != self.filename:
            frames.pop(0)  # the runner's own
        for n, frame in enumerate(frames):
            if frame.filename == self.filename:
                file, line = self.origins[frame.lineno - 1]
                text = self.lines[frame.lineno - 1]
                frames[n] = traceback.FrameSummary(file, line, frame.name, line=text)
        return frames

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        """A known state of Python and torch within, the old one after."""
        with contextlib.ExitStack() as stack:
            after = stack.callback
            for get, set_, start in _TORCH_STATE:
                after(_change, get, set_, get())
                _change(get, set_, start)
            after(torch.set_rng_state, torch.get_rng_state())
            torch.manual_seed(0)
            after(random.setstate, random.getstate())
            random.seed(0)
            after(torch.set_printoptions, profile="default")
            torch.set_printoptions(profile="default")
            after(_restore, sys.modules, dict(sys.modules), {"__main__"})
            sys.modules["__main__"] = self.module
            after(_restore, os.environ, dict(os.environ), None)
            after(sys.path.__setitem__, slice(None), list(sys.path))
            after(linecache.cache.pop, self.filename, None)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(contextlib.chdir(folder))
            yield


class EmptyBlock(Exception):
    pass


def _change(get, set_, value) -> None:
    if get() != value:  # some setters import half of torch
        set_(value)


def _restore(now, before, names) -> None:
    for name in names or set(now) | set(before):
        if name in before:
            now[name] = before[name]
        else:
            now.pop(name, None)


def asserts(code: str) -> bool:
    """Whether code asserts something."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith("assert"):
                return True
    return False


_TORCH_STATE = [
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_default_device, torch.set_default_device, torch.device("cpu")),
    (torch.is_grad_enabled, torch.set_grad_enabled, True),
    (torch.get_num_threads, torch.set_num_threads, 1),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
    (torch.is_warn_always_enabled, torch.set_warn_always, True),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
        False,
    ),
    (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        False,
    ),
]
