"""Live figures: the page runs the snippet's own graph in the reader's browser.

A fence such as

    ```live name="dot-product/live" caption="What to try."
    def figure(x, temperature):
        _, weights = scaled_dot_product_attention(x, x, x, return_weights=True)
        return {"weights": weights}

    live(figure, x=numbers([[1, 2], [3, 4]]), temperature=slider(0.1, 5, 1.0),
         views=[heatmap("weights")])
    ```

runs after the blocks above it and uses their names: the function calls the snippet, and
is exported with it (export.py). What the fence gives is stored as any figure is, and
compared by the tests: NAME.json holds the graph, NAME.html what a reader without
JavaScript sees, the same figure at its default inputs. docs/assets/live/ runs the one
and moves the other.
"""

import html
import json
import math
from dataclasses import asdict, dataclass, field

from pymdownx.superfences import SuperFencesException

from tools.figures import FOLDER, lead

# --- controls: what the reader can move, and the tensor that it gives ----------------


@dataclass
class Control:
    kind: str
    value: object
    label: str = ""
    options: dict = field(default_factory=dict)
    name: str = ""

    def tensor(self):
        import torch

        if self.kind == "text":
            slots, known = self.options["slots"], self.options["vocabulary"]
            ids = [word_id(word, known) for word in self.value.split()][:slots]
            return torch.tensor(ids + [-1] * (slots - len(ids)))
        if self.kind == "toggle":
            return torch.tensor(bool(self.value))
        if self.kind == "choice":
            return torch.tensor(self.value)
        return torch.tensor(self.value, dtype=torch.float32)

    def html(self) -> str:
        label = html.escape(self.label or self.name)
        data = f'data-input="{self.name}" data-kind="{self.kind}"'
        data += f" data-options='{_json(self.options)}'"
        if self.kind == "slider":
            o = self.options
            return (
                f'<label {data}>{label} <input type="range" min="{o["low"]}" '
                f'max="{o["high"]}" step="{o["step"]}" value="{self.value}">'
                f'<span class="value">{self.value}</span></label>'
            )
        if self.kind == "toggle":
            on = " checked" if self.value else ""
            return f'<label {data}><input type="checkbox"{on}> {label}</label>'
        if self.kind == "choice":
            options = "".join(
                f'<option value="{n}"{" selected" * (n == self.value)}>'
                f"{html.escape(option)}</option>"
                for n, option in enumerate(self.options["labels"])
            )
            return f"<label {data}>{label} <select>{options}</select></label>"
        if self.kind == "text":
            text = html.escape(self.value)
            return (
                f'<label {data}>{label} <input type="text" value="{text}" '
                'autocomplete="off" spellcheck="false"></label>'
            )
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td><input {self._cell(x)} "
                f'aria-label="{label}, row {i + 1}, column {j + 1}"></td>'
                for j, x in enumerate(row)
            )
            + "</tr>"
            for i, row in enumerate(self.value)
        )
        return f'<table class="cells" {data}><caption>{label}</caption>{rows}</table>'

    def _cell(self, x: float) -> str:
        if self.options.get("pixels"):
            return 'type="checkbox"' + " checked" * bool(x)
        return f'type="number" step="any" value="{x:g}"'


def slider(low, high, value, step=None, label=""):
    """A number; a 0-d float32 tensor."""
    step = step or (high - low) / 100
    return Control("slider", value, label, {"low": low, "high": high, "step": step})


def choice(labels, value=0, label=""):
    """One of several; the 0-d int64 tensor of its position."""
    return Control("choice", value, label, {"labels": list(labels)})


def toggle(value, label=""):
    """On or off; a 0-d bool tensor."""
    return Control("toggle", value, label)


def numbers(rows, label=""):
    """An editable matrix, float32."""
    return Control("numbers", [[float(x) for x in row] for row in rows], label)


def pixels(rows, label=""):
    """A matrix of squares to switch on and off, float32: 0 or 1."""
    ink = [[float(bool(x)) for x in row] for row in rows]
    return Control("numbers", ink, label, {"pixels": True})


def text(value, slots, vocabulary, label=""):
    """Words as ids: int64 of length `slots`, -1 where there is no word.

    `vocabulary` lists the words that are known; all others have the id behind them. A
    number instead gives every word one of so many ids.
    """
    return Control("text", value, label, {"slots": slots, "vocabulary": vocabulary})


def word_id(word: str, rows: int | list[str]) -> int:
    """A word's row of an embedding table: its place in a list, as in live.js, or FNV-1a
    of its letters."""
    if isinstance(rows, list):
        return rows.index(word.lower()) if word.lower() in rows else len(rows)
    hashed = 2166136261
    for byte in word.lower().encode():
        hashed = ((hashed ^ byte) * 16777619) % 2**32
    return hashed % rows


# --- views: what the figure shows, drawn once here, moved by live.js -----------------


@dataclass
class View:
    kind: str
    output: str = ""
    options: dict = field(default_factory=dict)

    def html(self, outputs: dict, controls: dict) -> str:
        drawn = _DRAW[self.kind](self, outputs, controls)
        spec = html.escape(_json({**asdict(self), **self.options}), quote=True)
        reach = ' tabindex="0"' * (
            self.kind == "heatmap"
        )  # it may be wide: keys scroll
        return f'<div class="view {self.kind}"{reach} data-view="{spec}">{drawn}</div>'


def heatmap(
    output, rows=None, columns=None, hidden=None, title="", digits=2, top=1.0,
    marked=None,
):  # fmt: skip
    """A table of a matrix (R, C), or of several (H, R, C), shaded up to `top`.

    `rows` and `columns` are labels, or the name of a text control whose words they are;
    `hidden` is a bool output that is True where a dot stands for a masked cell, and
    `marked` one that is True where a cell has a frame.
    """
    return View("heatmap", output, _named(locals(), "output"))


def lines(series, x, xlim=None, ylim=(0, 1), xlabel="", ylabel=""):
    """Curves over fixed axes: `series` is {label: output}, all of the length of `x`."""
    x = [float(value) for value in x]
    return View("lines", "", _named({**locals(), "xlim": xlim or (min(x), max(x))}))


def bars(output, labels, ylim=(0, 1), ylabel=""):
    """A bar for each value of a vector."""
    return View("bars", output, _named({**locals(), "labels": list(labels)}, "output"))


def scatter(
    output, xlim, ylim, labels=None, xlabel="", ylabel="", arrows=False, ring=None
):
    """Points (N, 2), as vectors from the origin with `arrows`.

    `ring` is an output, the radius of a circle around the origin.
    """
    return View("scatter", output, _named(locals(), "output"))


def network(output, left, right):
    """Routes from left (R) to right (C), as strong as the weights (R, C)."""
    return View("network", output, _named(locals(), "output"))


def steps(title="What each line computes"):
    """The snippet's lines in the order they ran, each with its shape and values."""
    return View("steps", "", {"title": title})


def _named(values: dict, *but: str) -> dict:
    kept = {name: value for name, value in values.items() if name not in but}
    return {n: list(v) if isinstance(v, range) else v for n, v in kept.items()}


def _json(value) -> str:
    return html.escape(json.dumps(value, ensure_ascii=False), quote=False).replace(
        "'", "&#39;"
    )


def number(value: float, digits: int = 2) -> str:
    """As live.js prints it: -0.00 is 0.00."""
    printed = f"{value:.{digits}f}"
    return printed.lstrip("-") if float(printed) == 0 else printed.replace("-", "−")


def _labels(given, count: int, controls: dict) -> list[str]:
    if isinstance(given, str):
        words = controls[given].value.split()[:count]
        return words + [""] * (count - len(words))
    return [str(label) for label in given] if given else [""] * count


def _draw_heatmap(view: View, outputs: dict, controls: dict) -> str:
    values = outputs[view.output]
    hidden = outputs.get(view.options["hidden"])
    marked = outputs.get(view.options["marked"])
    many = values.dim() == 3
    tables = []
    for n, matrix in enumerate(values if many else [values]):
        mask = (
            hidden[n] if many and hidden is not None and hidden.dim() == 3 else hidden
        )
        title = view.options["title"]
        title = title[n] if isinstance(title, list | tuple) else title
        tables.append(_table(view, matrix, mask, title, controls, marked))
    return "".join(tables)


def _table(view: View, matrix, mask, title: str, controls: dict, marked=None) -> str:
    o = view.options
    rows = _labels(o["rows"], matrix.shape[0], controls)
    columns = _labels(o["columns"], matrix.shape[1], controls)
    gone = [isinstance(o[side], str) for side in ("rows", "columns")]
    head = "".join(
        f'<th scope="col"{" hidden" * (gone[1] and not c)}>{html.escape(c)}</th>'
        for c in columns
    )
    head = f"<thead><tr><td></td>{head}</tr></thead>" if any(columns) else ""
    body = []
    for i, row in enumerate(matrix.tolist()):
        # Words come and go; a row that has no label is no header.
        label = f'<th scope="row">{html.escape(rows[i])}</th>'
        cells = [label if rows[i] or gone[0] else "<td></td>"] if any(rows) else []
        for j, value in enumerate(row):
            off = mask is not None and bool(mask[i, j])
            shade = min(1, abs(value) / o["top"])
            style = "" if off else f' style="--v:{shade:.2f}"'
            sign = ' class="negative"' if value < 0 and not off else ""
            none = " hidden" * (gone[1] and not columns[j])
            if marked is not None:
                none += f' aria-current="{str(bool(marked[i, j])).lower()}"'
            shown = "·" if off else number(value, o["digits"])
            cells.append(f"<td{sign}{style}{none}>{shown}</td>")
        none = " hidden" * (gone[0] and not rows[i])
        body.append(f"<tr{none}>{''.join(cells)}</tr>")
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    rows_ = "".join(body)
    return f'<table class="cells">{caption}{head}<tbody>{rows_}</tbody></table>'


# The plot's frame: live.js has the same numbers.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 46, 12, 12, 40


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    clipped = min(max(value, low), high)
    return round(start + (clipped - low) / (high - low) * (end - start), 1)


def _x(value, o) -> float:
    return _place(value, *o["xlim"], LEFT, WIDTH - RIGHT)


def _y(value, o) -> float:
    return _place(value, *o["ylim"], HEIGHT - BOTTOM, TOP)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(s for s in (step, 2 * step, 5 * step) if (high - low) / s <= 5)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _frame(o: dict, inner: str, summary: str, xticks: bool = True) -> str:
    marks = []
    for value in _ticks(*o["ylim"]):
        y = _y(value, o)
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_tick(value)}</text>'
        )
    for value in _ticks(*o["xlim"]) if xticks else []:
        marks.append(
            f'<text x="{_x(value, o)}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{_tick(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(o.get('xlabel', ''))}</text>"
    )
    if o.get("ylabel"):
        marks.append(
            f'<text transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) '
            'rotate(-90)" '
            f'text-anchor="middle">{html.escape(o["ylabel"])}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(summary)}"><g class="axes" aria-hidden="true">'
        f"{''.join(marks)}</g>{inner}</svg>"
    )


def _draw_lines(view: View, outputs: dict, controls: dict) -> str:
    o = view.options
    paths, keys, said = [], [], []
    for n, (label, output) in enumerate(o["series"].items(), 1):
        values = outputs[output].tolist()
        points = " ".join(
            f"{_x(x, o)},{_y(y, o)}" for x, y in zip(o["x"], values, strict=False)
        )
        paths.append(f'<polyline class="series s{n}" points="{points}"/>')
        keys.append(f'<li class="s{n}">{html.escape(label)}</li>')
        said.append(describe(label, values))
    key = f'<ul class="key" aria-hidden="true">{"".join(keys)}</ul>'
    return key * (len(keys) > 1) + _frame(o, "".join(paths), " ".join(said))


def describe(label: str, values: list[float]) -> str:
    """A curve in words, as live.js says it when the values move."""
    if not values:
        return f"{label}: no values."
    return (
        f"{label}: from {number(values[0])} to {number(values[-1])}, "
        f"lowest {number(min(values))}, highest {number(max(values))}."
    )


def _draw_bars(view: View, outputs: dict, controls: dict) -> str:
    o = {**view.options, "xlim": (0, len(view.options["labels"]))}
    values = outputs[view.output].tolist()
    zero = _y(max(o["ylim"][0], 0), o)
    marks = []
    for n, (label, value) in enumerate(zip(o["labels"], values, strict=True)):
        left, right, y = _x(n + 0.15, o), _x(n + 0.85, o), _y(value, o)
        marks.append(
            f'<rect class="s1" x="{left}" width="{right - left:.1f}" '
            f'y="{min(y, zero)}" height="{abs(zero - y):.1f}"/>'
        )
        marks.append(
            f'<text x="{_x(n + 0.5, o)}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{html.escape(str(label))}</text>'
        )
    said = ", ".join(
        f"{label} {number(value)}"
        for label, value in zip(o["labels"], values, strict=True)
    )
    return _frame(o, "".join(marks), said + ".", xticks=False)


def _draw_scatter(view: View, outputs: dict, controls: dict) -> str:
    o = view.options
    labels = o["labels"] or []
    marks, said = [], []
    center = _x(0, o), _y(0, o)
    if o["ring"]:
        radius = float(outputs[o["ring"]])
        rx, ry = _x(radius, o) - center[0], center[1] - _y(radius, o)
        marks.append(
            f'<ellipse class="ring" cx="{center[0]}" cy="{center[1]}" '
            f'rx="{rx:.1f}" ry="{ry:.1f}"/>'
        )
    for n, (x, y) in enumerate(outputs[view.output].tolist()):
        label = str(labels[n]) if n < len(labels) else ""
        at, series = (_x(x, o), _y(y, o)), n + 1 if o["arrows"] else 1
        tail = (
            f'<line class="s{series}" x2="{center[0] - at[0]:.1f}" '
            f'y2="{center[1] - at[1]:.1f}"/>'
        ) * o["arrows"]
        marks.append(
            f'<g transform="translate({at[0]} {at[1]})">{tail}'
            f'<circle class="s{series}" r="4"/>'
            f'<text x="7" y="4">{html.escape(label)}</text></g>'
        )
        said.append(f"{label} at {number(x)}, {number(y)}".strip())
    return _frame(o, "".join(marks), "; ".join(said) + ".")


def _draw_network(view: View, outputs: dict, controls: dict) -> str:
    o = view.options
    weights = outputs[view.output].tolist()
    left = _labels(o["left"], len(weights), controls)
    right = _labels(o["right"], len(weights[0]), controls)
    height = 30 * max(len(left), len(right))

    def y(n, count):
        return round((n + 0.5) * height / count, 1)

    marks, said = [], []
    for i, row in enumerate(weights):
        for j, value in enumerate(row):
            marks.append(
                f'<line class="s1" x1="110" y1="{y(i, len(left))}" x2="310" '
                f'y2="{y(j, len(right))}" stroke-width="{6 * value:.1f}"/>'
            )
        best = max(range(len(row)), key=row.__getitem__)
        said.append(f"{left[i]} mostly to {right[best]}, {number(row[best])}")
    for side, x, anchor in ((left, 100, "end"), (right, 320, "start")):
        for n, label in enumerate(side):
            marks.append(
                f'<text x="{x}" y="{y(n, len(side)) + 4}" text-anchor="{anchor}">'
                f"{html.escape(label)}</text>"
            )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape("; ".join(said))}.">{"".join(marks)}</svg>'
    )


def _draw_steps(view: View, outputs: dict, controls: dict) -> str:
    shown = []
    for step in view.options["lines"]:
        value = outputs["%" + step["node"]]
        shape = "×".join(map(str, value.shape)) or "one number"
        shown.append(
            f"<li><details><summary><code>{html.escape(step['code'])}</code> "
            f'<span class="shape">{shape}</span></summary>'
            f'<div class="values" data-node="{step["node"]}">{_slices(value)}</div>'
            "</details></li>"
        )
    title = html.escape(view.options["title"])
    return f'<p class="steps-title">{title}</p><ol class="steps">{"".join(shown)}</ol>'


def _slices(value) -> str:
    """A tensor as tables, a matrix each; live.js makes the same."""
    value = value.double()
    while value.dim() < 2:
        value = value.unsqueeze(0)
    top = max(value.abs().max().item(), 1e-9)
    tables = []
    matrices = value.reshape(-1, *value.shape[-2:]) if value.numel() else []
    for n, matrix in enumerate(matrices):
        view = heatmap("", top=top)
        title = f"{n + 1} of {len(matrices)}" if len(matrices) > 1 else ""
        tables.append(_table(view, matrix, None, title, {}))
    return "".join(tables) or "<p>no values</p>"


_DRAW = {
    "heatmap": _draw_heatmap,
    "lines": _draw_lines,
    "bars": _draw_bars,
    "scatter": _draw_scatter,
    "network": _draw_network,
    "steps": _draw_steps,
}


# --- the fence: run by the tests, stored, and set into the page ----------------------


def draw(program, block) -> dict[str, str]:
    """Run a live figure's code in its page's program: what is stored, by suffix."""
    import torch

    from tools.export import export, pack

    asked: list[tuple] = []

    def live(function, views, state=None, train=None, **controls):
        """Export `function` and show `views` of what it returns.

        `state` ({name: tensor}) makes it a training step: the function takes the state
        and returns it renewed under the same names; `train` says for how many steps,
        and every 0-d output becomes a curve over them.
        """
        for name, control in controls.items():
            control.name = name
        asked.append((function, controls, state or {}, train, views))

    tools = [slider, choice, toggle, numbers, pixels, text]
    tools += [heatmap, lines, bars, scatter, network, steps, live]
    before = torch.get_rng_state()
    program.run(block, {tool.__name__: tool for tool in tools})
    if len(asked) != 1:
        raise ValueError("a live block calls live() once")
    function, controls, state, train, views = asked[0]
    inputs = {name: control.tensor() for name, control in controls.items()}
    graph, outputs = export(function, {**inputs, **state}, program.locate)
    if state:
        outputs |= _train(function, inputs, state, train)
    for view in views:
        if view.kind == "steps":
            view.options["lines"] = _lines(graph, program)
    torch.set_rng_state(before)
    name = block.fence.options["name"]
    spec = {
        "graph": graph,
        "train": train,
        "state": {k: pack(v) for k, v in state.items()},
    }
    return {
        ".json": json.dumps(spec, separators=(",", ":"), sort_keys=True) + "\n",
        ".html": _figure(name, controls, train, views, outputs),
    }


def _train(function, inputs, state, steps_) -> dict:
    """The curves of a training run at the default inputs."""
    import torch

    curves: dict[str, list[float]] = {}
    for _ in range(steps_):
        outputs = function(**inputs, **state)
        state = {name: outputs[name].detach() for name in state}
        for name, value in outputs.items():
            if value.dim() == 0:
                curves.setdefault(name, []).append(value.item())
    return {name: torch.tensor(values) for name, values in curves.items()}


def _lines(graph: dict, program) -> list[dict]:
    """The snippet's lines in the order they end in, each with the last it computes."""
    found: dict[tuple, dict] = {}
    for node in graph["nodes"]:
        if not node.get("at") or not node["at"][0].startswith("snippets/"):
            continue
        at = file, line = tuple(node["at"])
        found.pop(at, None)
        code = program.line(file, line).strip()
        found[at] = {"code": code, "node": node["name"]}
    return list(found.values())


def _figure(name, controls, train, views, outputs) -> str:
    shown = "".join(control.html() for control in controls.values())
    if train:
        shown += (
            '<span class="buttons"><button type="button" data-act="run">Train</button>'
            '<button type="button" data-act="reset">Reset</button>'
            f"<output>{train} of {train} steps</output></span>"
        )
    drawn = "".join(view.html(outputs, controls) for view in views)
    drawn = f'<div class="views">{drawn}</div>'
    return (
        f'<live-figure data-name="{name}"><fieldset hidden><legend>Move the inputs'
        f"</legend>{shown}</fieldset>{drawn}</live-figure>\n"
    )


def validate(language, inputs, options, attrs, md) -> bool:
    if not inputs.get("name") or not inputs.get("caption"):
        raise SuperFencesException(f"a live figure needs name= and caption=: {inputs}")
    options.update(inputs)
    return True


def fence(source, language, css_class, options, md, **kwargs) -> str:
    """The stored figure at its default inputs, in the page."""
    from tools.blocks import digest

    stored = FOLDER / f"{options['name']}.html"
    if not stored.exists():
        raise SuperFencesException(f"{stored} is not drawn yet: make outputs")
    figure = stored.read_text(encoding="utf-8")
    caption = f"<figcaption>{html.escape(options['caption'])}</figcaption>"
    return (
        f'<figure class="live" data-code="{digest(source)}"{lead(options)}'
        " data-search-exclude>"
        f"{figure}{caption}</figure>"
    )
