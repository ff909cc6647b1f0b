"""The views of a live figure: what it shows. docs/assets/live/draw.js draws it.

The page calls draw.js in the reader's browser; here the same file runs in QuickJS, for
the figure that a reader without JavaScript sees.
"""

import math

from tools.javascript import javascript


def heatmap(
    output, rows=None, columns=None, hidden=None, title=None, digits=2, top=1.0,
    marked=None,
):  # fmt: skip
    """A table of a matrix (R, C), or of several (H, R, C), shaded up to `top`.

    `rows` and `columns` are labels, or the name of a text control whose words they are;
    `hidden` is a bool output that is True where a dot stands for a masked cell, and
    `marked` one that is True where a cell has a frame.
    """
    return _view("heatmap", **locals())


def lines(series, x, xlim=None, ylim=(0, 1), xlabel="", ylabel=""):
    """Curves over fixed axes: `series` is {label: output}, all of the length of `x`."""
    x = [float(value) for value in x]
    series, xlim = list(series.items()), xlim or (min(x), max(x))
    return _view("lines", **locals())


def bars(output, labels, ylim=(0, 1), ylabel=""):
    """A bar for each value of a vector."""
    labels = [str(label) for label in labels]
    xlim, xticks = (0, len(labels)), [(n + 0.5, name) for n, name in enumerate(labels)]
    return _view("bars", **locals())


def scatter(
    output, xlim, ylim, labels=None, xlabel="", ylabel="", arrows=False, ring=None
):
    """Points (N, 2), as vectors from the origin with `arrows`.

    `ring` is an output, the radius of a circle around the origin.
    """
    return _view("scatter", **locals())


def network(output, left, right):
    """Routes from left (R) to right (C), as strong as the weights (R, C)."""
    return _view("network", **locals())


def _view(kind: str, **given) -> dict:
    for name in LABELS:
        if given.get(name) is not None and not isinstance(given[name], str):
            given[name] = [str(label) for label in given[name]]
    if "ylim" in given:
        given["yticks"] = _ticks(*given["ylim"])
        given.setdefault("xticks", _ticks(*given["xlim"]))
    return {"kind": kind} | {n: v for n, v in given.items() if v is not None}


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """At most six, at 1, 2 or 5 times a power of ten; and how each is printed."""
    ten = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(s for s in (ten, 2 * ten, 5 * ten) if (high - low) / s <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [n * step for n in range(first, last + 1)]
    return [(value, f"{value:g}".replace("-", "−")) for value in values]


# Labels, and the dimension that they stand along.
LABELS = {"rows": -2, "columns": -1, "labels": 0, "left": -2, "right": -1}


def draw(view: dict, outputs: dict, words: dict) -> str:
    """A view of what a figure returned, as HTML.

    Raises:
        ValueError: labels and values differ in number, or a curve is longer than x.
    """
    names = [view[n] for n in ("output", "hidden", "marked", "ring") if n in view]
    names += [output for _, output in view.get("series", [])]
    shapes = {name: list(outputs[name].shape) for name in names}
    for name in LABELS.keys() & view.keys():
        given, size = view[name], shapes[view["output"]][LABELS[name]]
        count = len(words[given] if isinstance(given, str) else given)
        if count != size and view["kind"] != "scatter":  # there some may have none
            raise ValueError(f"{name}: {count} labels for {size} values")
    for label, output in view.get("series", []):
        size, count = shapes[output][0], len(view["x"])
        if size > count:
            raise ValueError(f"{label}: {size} values where x has {count}")
    tensors = {
        name: {"shape": shape, "data": outputs[name].double().flatten().tolist()}
        for name, shape in shapes.items()
    }
    drawn = javascript("draw.js", "draw", view, tensors, words)
    reach = ' tabindex="0"' * (view["kind"] == "heatmap")  # it may be wide: keys scroll
    return f'<div class="view {view["kind"]}"{reach}>{drawn}</div>'
