"""Export what a snippet computes as a graph that the page can run.

torch traces the function down to ATen operations, through autograd as well, so that a
training step can be exported. What the executor in docs/assets/live/executor.js lacks
is decomposed by torch into what it has. Constants are computed once, here. Each node
keeps its shape and dtype.
"""

import base64
import functools
import json
import math
import operator
import re
import traceback
from unittest.mock import patch

import torch

# Private: torch.export.default_decompositions() is the core table alone, which leaves
# much whole that the executor lacks, such as gelu.
from torch._decomp import core_aten_decompositions, decomposition_table

# Experimental: torch.export does not trace the gradients that a training step takes.
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.proxy import TracerBase
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.javascript import javascript

DTYPES = ("float32", "float64", "int64", "int32", "int8", "uint8", "bool")
# They return their input: a value that never changes needs no copy.
_NOTHING = {"detach", "alias", "clone", "lift_fresh_copy", "lift_fresh"}
# They take a shape from their input, and no value.
_FIXED = {"full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}
# Where things are, not what they are.
_NO_MATTER = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}


@functools.cache
def supported() -> frozenset[str]:
    """The operations that the executor has."""
    return frozenset(javascript("executor.js", "Object.keys(OPS)"))


def short(op) -> str:
    """An operation's name in the graph: the same for a tensor as for a number."""
    return _OVERLOAD.sub("", str(op).removeprefix("aten."))


_OVERLOAD = re.compile(
    r"\.(default|Tensor|Scalar|Tensor_Scalar|Tensor_Tensor|dim_IntList)$"
)


def export(function, inputs: dict, locate) -> tuple[dict, dict]:
    """Trace `function`, which takes tensors by name and returns a dict of tensors.

    Returns:
        the graph, and what the function returned.

    Raises:
        ValueError: it does what no graph can hold, or an operation that the executor
            lacks; the message names the author's line.
    """
    expected = function(**inputs)
    names = list(expected)

    def flat(*tensors):
        outputs = function(**dict(zip(inputs, tensors, strict=True)))
        return [outputs[name] for name in names]

    # Private in name, but made to be overridden, torch says: it looks for a `forward`,
    # which the author's function is not.
    def own(_, stack):
        known = [f for f in stack if locate(f.filename, f.lineno)]
        return traceback.StackSummary.from_list(known[-1:])

    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            patch.object(TracerBase, "_filter_traceback_frames", own),
        ):
            traced = make_fx(flat, _table(), record_stack_traces=True)(*inputs.values())
    except RuntimeError as error:
        raise ValueError(
            f"{_place(error, locate)}: can't be exported: {error}"
        ) from error

    graph = _Graph(traced, inputs, locate).build(names)
    values = run(graph, inputs)
    for name in names:
        difference = (values[name].double() - expected[name].double()).abs()
        if difference.numel() and difference.max() > 1e-5:
            raise ValueError(f"the exported graph computes another {name!r}")
    return graph, values


@functools.cache
def _table() -> dict:
    """How torch takes apart what the executor lacks."""
    # Some of torch's decompositions end in prims instead of ATen: not those.
    table = {op: how for op, how in decomposition_table.items() if _in_aten(how)}
    table |= core_aten_decompositions()
    kept = supported() | _NOTHING | _FIXED
    return {op: how for op, how in table.items() if short(op) not in kept}


def _in_aten(how) -> bool:
    return "_refs" not in getattr(how, "__module__", "_refs")


def _place(error: BaseException, locate) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    known = [found for f in frames if (found := locate(f.filename, f.lineno))]
    return ":".join(map(str, known[-1])) if known else "the function"


class _Graph:
    """Turns a traced module into the nodes of our graph."""

    def __init__(self, traced, inputs: dict, locate):
        self.traced, self.locate = traced, locate
        self.inputs = inputs
        self.nodes: list[dict] = []
        self.constants: dict[str, dict] = {}
        self.value: dict = {}  # fx node to its tensor, for these inputs
        self.fixed: set = set()  # fx nodes that do not depend on the inputs
        self.ref: dict = {}  # fx node to its name here
        self.seen: dict[str, dict] = {}  # the same operation on the same tensors

    def build(self, outputs: list[str]) -> dict:
        places = iter(self.inputs.items())
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                name, self.value[node] = next(places)
                self.ref[node] = {"t": name}
            elif node.op == "get_attr":
                self.value[node] = getattr(self.traced, node.target).detach()
                self.fixed.add(node)
            elif node.op == "output":
                found = {
                    n: self.arg(a) for n, a in zip(outputs, node.args[0], strict=True)
                }
            else:
                self.call(node)
        used = _used(self.nodes, found)
        return {
            "inputs": list(self.inputs),
            "constants": {n: c for n, c in self.constants.items() if n in used},
            "nodes": [node for node in self.nodes if node["name"] in used],
            "outputs": found,
        }

    def call(self, node) -> None:
        name, _, overload = str(node.target).removeprefix("aten.").partition(".")
        if name.endswith("_"):  # in place: the trace goes on with what it returns
            node.target = getattr(getattr(torch.ops.aten, name[:-1]), overload)
        value = torch.fx.node.map_arg(node.args, self.value.__getitem__)
        options = torch.fx.node.map_arg(node.kwargs, self.value.__getitem__)
        with torch.no_grad():
            self.value[node] = result = node.target(*value, **options)
        inputs = node.all_input_nodes
        if short(node.target) in _FIXED or all(n in self.fixed for n in inputs):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                self.refuse(node, "random numbers: make them an input")
            self.fixed.add(node)
        elif node.target is operator.getitem:
            self.ref[node] = {**self.arg(node.args[0]), "n": node.args[1]}
        else:
            self.operation(node, result)

    def operation(self, node, result) -> None:
        name = short(node.target)
        if name in _NOTHING:
            self.ref[node] = self.arg(node.args[0])
            return
        if name not in supported():
            self.refuse(node, "the executor has no such operation")
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _NO_MATTER}
        made = {"op": name, "args": [self.arg(a) for a in node.args]}
        if kwargs:
            made["kwargs"] = {k: self.arg(v) for k, v in kwargs.items()}
        if isinstance(result, torch.Tensor):
            made |= self.kind(node, result)
        else:
            made["outputs"] = [self.kind(node, part) for part in result]
        key = json.dumps(made)
        if key not in self.seen:
            made["name"] = str(len(self.nodes))
            self.seen[key] = made
            self.nodes.append(made)
        self.ref[node] = {"t": self.seen[key]["name"]}

    def arg(self, given):
        """An argument as JSON: a tensor is the name of its node."""
        if isinstance(given, torch.fx.Node):
            if given in self.fixed:
                return self.constant(given)
            return self.ref[given]
        if isinstance(given, list | tuple):
            return [self.arg(part) for part in given]
        if isinstance(given, torch.dtype):
            return str(given).removeprefix("torch.")
        if isinstance(given, float) and not math.isfinite(given):
            return {"f": str(given)}
        return given

    def constant(self, node):
        name = "c" + node.name
        if name not in self.constants:
            self.kind(node, self.value[node])
            self.constants[name] = pack(self.value[node])
        return {"t": name}

    def kind(self, node, tensor) -> dict:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            self.refuse(node, f"the executor has no {dtype}")
        return {"shape": list(tensor.shape), "dtype": dtype}

    def refuse(self, node, why: str):
        # The author's line, of the innermost frame that has one.
        frame = re.search(r'File "(.*)", line (\d+)', node.stack_trace or "")
        found = self.locate(frame[1], int(frame[2])) if frame else None
        place = ":".join(map(str, found)) if found else "the function"
        raise ValueError(f"{place}: {node.target} can't be exported: {why}")


def _names(arg):
    if isinstance(arg, dict) and "t" in arg:
        yield arg["t"]
    elif isinstance(arg, dict | list):
        for part in arg.values() if isinstance(arg, dict) else arg:
            yield from _names(part)


def _used(nodes: list[dict], outputs: dict) -> set[str]:
    used = set(_names(outputs))
    for node in reversed(nodes):
        if node["name"] in used:
            used |= set(_names(node["args"]))
    return used


def run(graph: dict, inputs: dict) -> dict:
    """Runs a graph with torch's own operations and returns its outputs."""
    constants = {name: unpack(c) for name, c in graph["constants"].items()}
    values = {**inputs, **constants}

    def given(arg):
        if isinstance(arg, list):
            return [given(part) for part in arg]
        if isinstance(arg, dict) and "t" in arg:
            return values[arg["t"]][arg["n"]] if "n" in arg else values[arg["t"]]
        return float(arg["f"]) if isinstance(arg, dict) else arg

    with torch.no_grad():
        for node in graph["nodes"]:
            name, _, overload = node["op"].partition(".")
            if name in ("view", "_unsafe_view"):  # the copies before them are gone
                name = "reshape"
            op = getattr(torch.ops.aten, name)
            op = getattr(op, overload) if overload else op
            kwargs = {k: given(v) for k, v in node.get("kwargs", {}).items()}
            if "dtype" in kwargs:
                kwargs["dtype"] = getattr(torch, node["dtype"])
            values[node["name"]] = op(*map(given, node["args"]), **kwargs)
    return {name: given(arg) for name, arg in graph["outputs"].items()}


def pack(tensor) -> dict:
    """A tensor as JSON: its bytes in base64."""
    data = tensor.detach().contiguous().numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "data": base64.b64encode(data).decode(),
    }


def unpack(packed: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(packed["data"]))
    dtype = getattr(torch, packed["dtype"])
    if not data:
        return torch.empty(packed["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(packed["shape"])
