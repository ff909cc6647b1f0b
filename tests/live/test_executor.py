"""The executor in the page against torch: every operation, every kind of graph."""

import json
import shutil
import subprocess
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup
from torch import nn

from snippets.attention.dot_product import scaled_dot_product_attention
from snippets.attention.multi_head import MultiHeadAttention
from snippets.attention.positional_encoding import rotary
from snippets.attention.transformer_block import TransformerBlock
from tools import export
from tools.javascript import LIVE

HARNESS = """
const run = (module, cases) => cases.map(({ graph, inputs }) => {
  const given = Object.entries(inputs).map(([name, t]) => [name, module.unpack(t)]);
  const outputs = module.load(graph).run(Object.fromEntries(given));
  return Object.entries(outputs).map(([name, { shape, dtype, data }]) =>
    [name, shape, dtype, Array.from(data, (v) => Number.isFinite(v) ? v : String(v))]);
});
"""


def cases_as_json(cases) -> list[dict]:
    return [
        {"graph": graph, "inputs": {name: export.pack(t) for name, t in inputs.items()}}
        for graph, inputs in cases
    ]


def tensors(results) -> list[dict[str, torch.Tensor]]:
    return [
        {
            name: torch.tensor([float(v) for v in data], dtype=torch.float64)
            .reshape(shape)
            .to(getattr(torch, dtype))
            for name, shape, dtype, data in result
        }
        for result in results
    ]


@pytest.fixture(scope="module")
def in_chromium(launch):
    browser = launch()
    page = browser.new_page()

    def run(cases, code):
        return tensors(
            page.evaluate(
                f"""async ([code, cases]) => {{
                    {HARNESS}
                    const blob = new Blob([code], {{ type: "text/javascript" }});
                    return run(await import(URL.createObjectURL(blob)), cases);
                }}""",
                [code, cases_as_json(cases)],
            )
        )

    yield run
    browser.close()


@pytest.fixture(scope="module")
def in_node(tmp_path_factory):
    if not shutil.which("node"):
        pytest.skip("no Node; Chromium runs the same comparisons")
    folder = tmp_path_factory.mktemp("node")

    def run(cases, code):
        (folder / "executor.mjs").write_text(code)
        (folder / "cases.json").write_text(json.dumps(cases_as_json(cases)))
        (folder / "main.mjs").write_text(
            'import * as module from "./executor.mjs";\n'
            'import { readFileSync } from "node:fs";\n'
            f"{HARNESS}\n"
            'const cases = JSON.parse(readFileSync("cases.json", "utf8"));\n'
            "console.log(JSON.stringify(run(module, cases)));\n"
        )
        done = subprocess.run(
            ["node", "main.mjs"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return tensors(json.loads(done.stdout))

    return run


@pytest.fixture(params=["chromium", "node"])
def executor(request):
    return request.getfixturevalue(f"in_{request.param}")


def nowhere(filename, line):
    return None


# --- the operations ------------------------------------------------------------------


def floats(*shape):
    return torch.randn(shape)


def positive(*shape):
    return torch.rand(shape) + 0.1


def integers(*shape):
    return torch.randint(-3, 4, shape)


def booleans(*shape):
    return torch.rand(shape) > 0.5


SHAPES = [(), (0,), (1,), (3, 4), (2, 1, 5)]
PAIRS = [
    ((3, 4), (3, 4)),
    ((3, 1), (1, 4)),
    ((2, 3, 4), (4,)),
    ((), (2,)),
    ((0, 2), (1,)),
]
AT = torch.tensor


def elementwise():
    for op in (
        torch.abs, torch.neg, torch.sign, torch.exp, torch.expm1, torch.sin, torch.cos,
        torch.tanh, torch.erf, torch.sigmoid, torch.relu, torch.floor, torch.isnan,
    ):  # fmt: skip
        for shape in SHAPES:
            yield op, floats(*shape)
    for op in (torch.log, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal):
        for shape in SHAPES:
            yield op, positive(*shape)
    yield torch.erf, torch.linspace(-4, 4, 101)
    yield torch.round, AT([-2.5, -1.5, -0.5, 0.4, 0.5, 1.5, 2.5])
    yield torch.relu, AT([torch.nan, -torch.inf, torch.inf, -0.0])
    yield torch.isnan, AT([torch.nan, 1.0])
    yield torch.abs, integers(3, 4)
    yield torch.neg, integers(5)
    for op in (torch.logical_not, torch.bitwise_not):
        yield op, booleans(3, 4)
        yield op, booleans(0)


def of_two():
    arithmetic = [torch.add, torch.sub, torch.mul, torch.minimum, torch.maximum]
    compare = [torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge]
    for a, b in PAIRS:
        for op in arithmetic:
            yield op, floats(*a), floats(*b)
            yield op, integers(*a), integers(*b)
        for op in compare:
            yield op, integers(*a).float(), integers(*b).float()
            yield op, integers(*a), integers(*b)
        yield torch.div, floats(*a), positive(*b)
        yield torch.pow, positive(*a), floats(*b)
        for op in (torch.logical_and, torch.logical_or):
            yield op, booleans(*a), booleans(*b)
        yield torch.bitwise_and, booleans(*a), booleans(*b)
        yield torch.bitwise_or, booleans(*a), booleans(*b)
        yield torch.where, booleans(*a), floats(*a), floats(*b)
        yield (lambda x, m: x.masked_fill(m, -torch.inf)), floats(*a), booleans(*a)
        yield (lambda x, m, v: x.masked_fill(m, v)), floats(*a), booleans(*a), floats()
    yield torch.add, floats(3), integers(3)  # the result is float32
    yield torch.div, integers(3), integers(3).abs() + 1
    yield (lambda a, b: torch.add(a, b, alpha=2.5)), floats(3), floats(3)
    yield (lambda a, b: torch.sub(a, b, alpha=-2)), floats(3), floats(3)
    yield torch.maximum, AT([torch.nan, 1.0]), AT([0.0, torch.nan])
    aten = torch.ops.aten
    for op in (aten.add, aten.sub, aten.rsub, aten.mul, aten.div):
        yield (lambda x, op=op: op.Scalar(x, 2.5)), floats(3, 4)
    for op in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge):
        yield (lambda x, op=op: op.Scalar(x, 1)), integers(3, 4)
    for power in (2, 3, 0.5, -1):
        yield (lambda x, power=power: x**power), positive(3, 4)
    yield (lambda x: 2.0**x), floats(3, 4)
    yield (lambda x: x.clamp(-0.5, 0.5)), floats(3, 4)
    yield (lambda x: x.clamp(min=0.1)), floats(3, 4)
    yield (lambda x: x.clamp(max=0.1)), floats(3, 4)
    yield (lambda x: torch.clamp_min(x, 0.2)), floats(3, 4)


def reductions():
    for shape in ((3, 4), (2, 3, 4), (1,), (0, 3)):
        yield torch.sum, floats(*shape)
        yield torch.sum, integers(*shape)
        for dim, keep in product((0, -1), (False, True)):

            def reduced(x, name, dim=dim, keep=keep):
                return getattr(x, name)(dim, keepdim=keep)

            yield partial(reduced, name="sum"), floats(*shape)
            yield partial(reduced, name="any"), booleans(*shape)
            yield partial(reduced, name="all"), booleans(*shape)
            if shape != (0, 3):
                for name in ("amax", "amin", "argmax", "mean", "prod"):
                    yield partial(reduced, name=name), floats(*shape)
    yield torch.mean, floats(3, 4)
    yield torch.argmax, AT([1.0, 3.0, 3.0, torch.nan])
    yield torch.argmax, AT([1.0, 3.0, 3.0])
    yield (lambda x: x.sum((0, -1))), floats(2, 3, 4)
    yield (lambda x: x.amax((0, 1))), AT([[1.0, torch.nan], [2.0, 3.0]])
    yield torch.any, booleans(3, 4)
    yield torch.all, booleans(3, 4)
    for correction in (0, 1):
        yield (lambda x, c=correction: x.var(-1, correction=c)), floats(3, 4)
    yield (lambda x: x.std(0)), floats(3, 4)
    for order in (1, 2, torch.inf):
        yield (lambda x, p=order: x.norm(p)), floats(3, 4)
        yield (lambda x, p=order: x.norm(p, dim=-1, keepdim=True)), floats(2, 3, 4)
    yield (lambda x: x.logsumexp(-1)), floats(3, 4)
    for dim in (0, -1):
        for op in (torch.softmax, torch.log_softmax, torch.cumsum):
            yield (lambda x, op=op, d=dim: op(x, d)), floats(2, 3, 4)
        yield (lambda x, d=dim: x.max(d)), floats(3, 4)
        yield (lambda x, d=dim: x.max(d, keepdim=True)), floats(3, 4)
        yield (lambda x, d=dim: x.topk(2, d)), floats(3, 4)
        yield (lambda x, d=dim: x.sort(d)), floats(3, 4)
        yield (lambda x, d=dim: x.sort(d, descending=True)), floats(3, 4)
        for down in (False, True):
            ties = AT([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, -1.0]])
            yield (
                (lambda x, d=dim, o=down: x.sort(dim=d, descending=o, stable=True)),
                ties,
            )
    yield (lambda x: x.sort(stable=True)), floats(3, 4)
    yield (lambda x: x.topk(2, largest=False)), floats(3, 4)
    yield (lambda x: torch.softmax(x, -1)), AT([[0.0, -torch.inf], [1.0, 2.0]])


def products():
    for n, k, m in ((2, 3, 4), (1, 1, 1), (0, 3, 2), (2, 0, 3)):
        yield torch.mm, floats(n, k), floats(k, m)
        yield torch.addmm, floats(m), floats(n, k), floats(k, m)
        yield torch.bmm, floats(2, n, k), floats(2, k, m)
    yield (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2)), *(
        floats(3, 3), floats(3, 2), floats(2, 3)
    )  # fmt: skip
    yield torch.matmul, floats(2, 3, 4, 5), floats(5, 2)
    yield torch.matmul, floats(3, 4), floats(4)
    yield torch.matmul, floats(4), floats(4)
    yield F.linear, floats(2, 3, 4), floats(5, 4), floats(5)
    yield F.conv2d, floats(2, 3, 6, 5), floats(4, 3, 3, 2), floats(4)
    yield (lambda x, w: F.conv2d(x, w, stride=2, padding=1)), *(
        floats(1, 1, 7, 7), floats(2, 1, 3, 3)
    )  # fmt: skip
    yield (lambda x, w: F.conv2d(x, w, dilation=2)), *(
        floats(1, 2, 7, 6), floats(1, 2, 3, 2)
    )  # fmt: skip
    yield (lambda x, w, b: F.layer_norm(x, (4,), w, b)), *(
        floats(2, 3, 4), floats(4), floats(4)
    )  # fmt: skip
    yield (lambda x: F.layer_norm(x, (3, 4))), floats(2, 3, 4)


def movements():
    for x in (floats(2, 3, 4), integers(2, 3, 4), booleans(2, 3, 4), floats(2, 0, 4)):
        yield (lambda x: x.reshape(-1, 2) if x.numel() else x.reshape(0, 2)), x
        yield (lambda x: x.permute(2, 0, -2)), x
        yield (lambda x: x.transpose(0, -1)), x
        yield (lambda x: x.transpose(1, 2).reshape(2, -1) if x.numel() else x), x
        yield (lambda x: x[:, :, 1:4:2]), x
        yield (lambda x: x[:, :, -3:-1]), x
        yield (lambda x: x[:, -1] if x.numel() else x), x
        yield (lambda x: x[:, None]), x
        yield (lambda x: x[:1].squeeze(0)), x
        yield (lambda x: x[:1, :, :1].squeeze((0, 2))), x
        yield (lambda x: x[:, :, :1].expand(2, -1, 5)), x
        yield (lambda x: torch.cat((x, x[:, :1], x), 1)), x
        yield (lambda x: torch.stack((x, x), -1)), x
        yield (lambda x: x.unfold(2, 3, 1)), x
        yield (lambda x: x.unfold(0, 1, 2).unfold(-2, 2, 2)), x
        yield (lambda x: x.split(2, -1)), x
        yield (lambda x: x.split((1, 3), 2)), x
        yield (lambda x: x.unbind(0)), x
        yield (lambda x: x.chunk(2, 2)), x
        yield (lambda x: x.flip(0, -1)), x
    yield (lambda x: (2 * x).add_(1).mul_(x)), floats(3, 4)
    yield (lambda x: x.t() + 1), floats(3, 4)
    yield (lambda x: x.t() * 2), floats(3)
    yield (lambda x: x[:, 1:].clone() + x[:, :-1]), floats(3, 4)
    yield (lambda x: F.pad(x, (1, 2, 0, 3), value=7.0)), floats(2, 3)
    yield (lambda x: F.pad(x, (2, 0))), integers(2, 3)
    for diagonal in (-1, 0, 2):
        yield (lambda x, d=diagonal: x.tril(d)), floats(2, 3, 4)
        yield (lambda x, d=diagonal: x.triu(d)), floats(4, 3)
    ids = AT([[2, 0], [1, 2]])
    yield F.embedding, ids, floats(3, 5)
    yield (lambda x, i: x[i]), floats(3, 5), ids
    yield (lambda x, i: x[:, i]), floats(2, 3, 5), ids
    yield (lambda x, i: x[i - 3]), floats(3, 5), ids
    yield (lambda x, i, j: x[i, j]), floats(3, 5), ids, AT([4, 1])
    yield (lambda x, i: x.index_select(-1, i)), floats(2, 3), AT([2, 2, 0])
    yield (lambda x, i: x.index_select(0, i)), floats(4, 3), AT([3, 0])
    yield (lambda x, i, j: x[i[:, None], j]), floats(4, 3), AT([3, 0]), AT([1, 1, 2])
    yield (lambda x, i: x.gather(1, i)), floats(2, 3), ids
    yield (lambda x, i: x.gather(-2, i)), floats(3, 2), ids
    yield (lambda x: x.long()), 3 * floats(3, 4)
    yield (lambda x: x.bool()), integers(3, 4)
    yield (lambda x: x.float() / 2), integers(3, 4)
    yield (lambda x: x.double() * 2), floats(3)
    for dtype in (torch.int8, torch.uint8, torch.int32):
        yield (lambda x, d=dtype: x.to(d).float() / 2), 3 * positive(3, 4)
        yield (lambda x, d=dtype: x.to(d) * 100), integers(3, 4)  # they wrap around
    yield (lambda x: x.to(torch.int8) - 3), 3 * floats(3, 4)


def named(function, values):
    """The function as export takes it: tensors by name, a dict of tensors back."""
    names = [f"x{n}" for n in range(len(values))]

    def wrapped(**inputs):
        found = function(*(inputs[name] for name in names))
        found = found if isinstance(found, tuple | list) else [found]
        return {f"y{n}": y for n, y in enumerate(found)}

    return wrapped, dict(zip(names, values, strict=True))


def agree(ours: dict, expected: dict, about="") -> None:
    for name, wanted in expected.items():
        found = ours[name]
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), about
        if wanted.is_floating_point():
            finite = wanted[wanted.isfinite()].abs()
            size = max(finite.max().item(), 1) if finite.numel() else 1
            torch.testing.assert_close(
                found, wanted, atol=1e-6 * size, rtol=0, equal_nan=True, msg=about
            )
        else:
            assert torch.equal(found, wanted), about


@pytest.fixture(scope="module")
def operations():
    """Each operation's graph, with its inputs and what torch gives for them."""
    torch.manual_seed(0)
    cases = []
    for kind in (elementwise, of_two, reductions, products, movements):
        for n, (function, *values) in enumerate(kind()):
            wrapped, inputs = named(function, values)
            graph, _ = export.export(wrapped, inputs, nowhere)
            about = f"{kind.__name__} {n}: {[node['op'] for node in graph['nodes']]}"
            cases.append((graph, inputs, wrapped(**inputs), about))
    return cases


def test_every_operation_computes_what_torch_computes(operations, executor):
    code = (LIVE / "executor.js").read_text(encoding="utf-8")
    results = executor([case[:2] for case in operations], code)
    for result, (*_, expected, about) in zip(results, operations, strict=True):
        agree(result, expected, about)


def test_no_operation_is_without_a_test(operations):
    tested = {node["op"] for graph, *_ in operations for node in graph["nodes"]}
    assert export.supported() - tested == set()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Math.exp(x - top)", "Math.exp((x - top) * 1.001)"),
        ("out[i] = scale * sum", "out[i] = 1.001 * scale * sum"),
        ("1 / (1 + Math.exp(-a))", "1.001 / (1 + Math.exp(-a))"),
        ("(v - mean) * rstd", "(v - mean) * rstd * 1.001"),
        ("(a, b) => a * b)", "(a, b) => a * b * 1.001)"),
    ],
)
def test_an_error_of_a_thousandth_is_seen(operations, in_chromium, right, wrong):
    code = (LIVE / "executor.js").read_text(encoding="utf-8")
    assert right in code
    results = in_chromium([case[:2] for case in operations], code.replace(right, wrong))
    with pytest.raises(AssertionError):
        for result, (*_, expected, about) in zip(results, operations, strict=True):
            agree(result, expected, about)


# --- whole graphs --------------------------------------------------------------------


def functions():
    torch.manual_seed(0)
    mha, block = MultiHeadAttention(8, 2), TransformerBlock(8, 2, 16, norm_first=False)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    lstm_like = nn.LSTMCell(4, 8)

    def attention(x, y, t):
        return scaled_dot_product_attention(x / t, y, y, return_weights=True)

    def training(w1, w2, x, rate):
        w1, w2 = w1.detach().requires_grad_(), w2.detach().requires_grad_()
        loss = F.cross_entropy(torch.tanh(x @ w1) @ w2, torch.arange(6) % 3)
        grads = torch.autograd.grad(loss, (w1, w2))
        return w1.detach() - rate * grads[0], w2.detach() - rate * grads[1], loss

    yield attention, floats(5, 8), floats(6, 8), positive()
    yield (lambda x: mha(x, is_causal=True, need_weights=True)), floats(2, 5, 8)
    yield (lambda x: block(x, future)), floats(2, 5, 8)
    yield rotary, floats(2, 5, 8)
    yield (
        (lambda x, h, c: lstm_like(x, (h, c))),
        floats(3, 4),
        floats(3, 8),
        floats(3, 8),
    )
    yield training, floats(4, 8), floats(8, 3), floats(6, 4), positive()


def test_whole_graphs_compute_what_torch_computes(executor):
    cases, expected = [], []
    for function, *values in functions():
        wrapped, inputs = named(function, values)
        graph, _ = export.export(wrapped, inputs, nowhere)
        for _ in range(10):
            fresh = {name: torch.randn_like(x).abs() for name, x in inputs.items()}
            cases.append((graph, fresh))
            expected.append(wrapped(**fresh))
    code = (LIVE / "executor.js").read_text(encoding="utf-8")
    for n, result in enumerate(executor(cases, code)):
        agree(result, expected[n], f"case {n}")


# --- the figures of the pages --------------------------------------------------------


FIGURES = sorted((LIVE.parent / "figures").rglob("*.json"))


def at_random(element, controls) -> torch.Tensor:
    """What a reader may set a control to."""
    control = controls[element["data-input"]]
    shape, known = control["shape"], control.get("known")
    if known is not None:
        words = torch.randint(len(known) + 1, shape)
        words[torch.randint(1, *shape, ()) :] = -1
        return words
    if control["dtype"] == "bool":
        return torch.rand(shape) > 0.5
    if control["dtype"] == "int64":
        return torch.randint(len(element.select("option")), shape)
    slider = element.select_one("[type=range]")
    if slider:
        return torch.empty(shape).uniform_(float(slider["min"]), float(slider["max"]))
    return torch.randn(shape)


@pytest.mark.parametrize(
    "path", FIGURES, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_figure_computes_what_torch_computes(path, executor):
    spec = json.loads(path.read_text(encoding="utf-8"))
    html = BeautifulSoup(path.with_suffix(".html").read_text("utf-8"), "html.parser")
    state = {name: export.unpack(packed) for name, packed in spec["state"].items()}
    cases, expected = [], []
    for _ in range(10):
        moved = {
            element["data-input"]: at_random(element, spec["controls"])
            for element in html.select("[data-input]")
        }
        state = {name: x + 0.1 * torch.randn_like(x) for name, x in state.items()}
        cases.append((spec["graph"], {**moved, **state}))
        found = export.run(*cases[-1])
        expected.append({name: found[name] for name in spec["graph"]["outputs"]})
    code = (LIVE / "executor.js").read_text(encoding="utf-8")
    for n, result in enumerate(executor(cases, code)):
        agree(result, expected[n], f"case {n}")


# --- what can't be exported ----------------------------------------------------------


def in_this_file(filename, line):
    return ("page.md", line) if filename == __file__ else None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: {"y": torch.fft.fft(x).real}, "_fft_r2c.*no such operation"),
        (lambda x: {"y": x + torch.rand(3)}, "random numbers: make them an input"),
        (lambda x: {"y": x if x.sum() > 0 else -x}, "get value out of a tracing"),
        (lambda x: {"y": x * x.max().item()}, "get value out of a tracing"),
        (lambda x: {"y": x.half()}, "has no float16"),
    ],
)
def test_what_cannot_be_exported_says_what_and_where(function, why):
    line = function.__code__.co_firstlineno
    with pytest.raises(ValueError, match=rf"^page\.md:{line}: (?s:.*){why}"):
        export.export(function, {"x": torch.ones(3)}, in_this_file)


def test_what_does_not_depend_on_the_inputs_is_a_constant():
    def function(x):
        return {"y": x + torch.arange(3).exp()}

    graph, _ = export.export(function, {"x": torch.ones(3)}, nowhere)
    assert [node["op"] for node in graph["nodes"]] == ["add"]
    assert len(graph["constants"]) == 1
