"""Figures: SVG drawn by the page's own code, in one hand.

A fence such as

    ```figure name="dot-product/scale" alt="What a reader who can't see it needs."
    axes = canvas(420, 220)
    axes.plot(widths, entropies, color=COLORS[0])
    ```

runs after the blocks above it and can use their names. The tests compare what it draws
with the stored SVG, as they compare outputs; `make outputs` stores it. The site takes
the stored one, so a build needs neither torch nor matplotlib.
"""

import io
import json
import math
import re
import xml.etree.ElementTree as etree
from pathlib import Path

from pymdownx.superfences import SuperFencesException

FOLDER = Path("docs/assets/figures")

# matplotlib is given these colours; the SVG gets the site's own variables for them.
INK, FAINT, PAPER = "#010101", "#020202", "#030303"
COLORS = ["#040401", "#040402", "#040403", "#040404", "#040405"]
_VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "paper"} | {
    color: str(n) for n, color in enumerate(COLORS, 1)
}
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (2, 1))]


def same(stored: Path, drawn: str) -> bool:
    """Equal but for what differs between processors: the last digits of coordinates."""
    if not stored.exists():
        return False
    old = stored.read_text(encoding="utf-8")
    if stored.suffix == ".json":
        return _close(json.loads(old), json.loads(drawn))
    if _COORDINATES.sub("", old) != _COORDINATES.sub("", drawn):
        return False
    pairs = zip(_COORDINATES.findall(old), _COORDINATES.findall(drawn), strict=True)
    return all(_near(a, b, 0.02 if name == "style" else 0.2)
               for (name, a), (_, b) in pairs)  # fmt: skip


# Where a mark stands, and how dark it is. All else, text above all, is exact.
_COORDINATES = re.compile(
    r"(?<=\s)(d|points|x|y|x1|y1|x2|y2|cx|cy|rx|ry|r|width|height|transform|"
    r'stroke-width|style)="([^"]*)"'
)
_NUMBER = re.compile(r"(?<![#\w-])-?\d+\.?\d*")


def _near(a: str, b: str, tolerance: float) -> bool:
    if _NUMBER.sub("0", a) != _NUMBER.sub("0", b):
        return False
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    return all(abs(float(x) - float(y)) <= tolerance for x, y in pairs)


def _close(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() == b.keys() >= {"data", "dtype", "shape"}:
            from tools.export import unpack

            same_kind = (a["dtype"], a["shape"]) == (b["dtype"], b["shape"])
            return same_kind and _close(unpack(a).tolist(), unpack(b).tolist())
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
    return a == b


def draw(program, block) -> dict[str, str]:
    """Run a figure's code in its page's program: what is stored, by suffix."""
    import matplotlib
    import torch

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # A page that is pasted draws no figures: they must not move its random numbers.
    with matplotlib.rc_context(style()), torch.random.fork_rng(devices=[]):
        try:
            program.run(block, _tools(plt))
            if len(plt.get_fignums()) != 1:
                raise ValueError("a figure block calls canvas() once")
            return {".svg": _svg(plt.gcf(), block.fence.options["name"])}
        finally:
            plt.close("all")


def style() -> dict:
    """matplotlib's settings for every plot of the site."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "",
        "font.size": 11,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 11,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "figure.constrained_layout.use": True,
    }


def _tools(plt) -> dict:
    """The names that a figure block finds beside those of its page."""

    def canvas(width: float, height: float, columns: int = 1, **options):
        """Axes of a size in CSS pixels; several side by side with `columns`."""
        size = (width / 72, height / 72)
        _, axes = plt.subplots(1, columns, figsize=size, **options)
        return axes

    def heatmap(axes, values, rows=None, columns=None, color=COLORS[0], hidden=None):
        """Cells as dark as their value; numbers where they fit; a dot where hidden."""
        values = values.detach().tolist() if hasattr(values, "detach") else values
        top = max(max(map(abs, row)) for row in values) or 1.0
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                shade = plt.Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, ec=PAPER, lw=0.5,
                    fc=color if value >= 0 else COLORS[1], alpha=abs(value) / top,
                    clip_on=False,
                )  # fmt: skip
                axes.add_patch(shade)
                if hidden is not None and hidden[i][j]:
                    axes.text(j, i, "·", ha="center", va="center", color=FAINT)
        axes.set_xlim(-0.5, len(values[0]) - 0.5)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_aspect("equal" if len(values) == len(values[0]) else "auto")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if columns is not None:
            axes.set_xticks(range(len(columns)), columns)
            axes.xaxis.tick_top()
        if rows is not None:
            axes.set_yticks(range(len(rows)), rows)

    def diagram(width: float, height: float):
        """Empty axes measured in CSS pixels from the top left, for box and arrow."""
        axes = canvas(width, height)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        axes.set_position((0, 0, 1, 1))
        axes.figure.set_layout_engine("none")
        return axes

    def box(axes, x, y, width, height, text, color=FAINT, fill=0.0):
        """A labelled box around its centre (x, y)."""
        corner = (x - width / 2, y - height / 2)
        # On paper of its own, so that a line can run behind it.
        for face, edge in (PAPER, "none"), ((color, fill) if fill else "none", color):
            axes.add_patch(
                plt.Rectangle(
                    corner, width, height, ec=edge, fc=face, lw=1.5, zorder=3,
                    clip_on=False,
                )
            )  # fmt: skip
        axes.text(x, y, text, ha="center", va="center", zorder=4)

    def arrow(axes, *points, color=INK):
        """A line through the points with a head at the last."""
        xs, ys = zip(*points, strict=True)
        if len(points) > 2:
            axes.plot(xs[:-1], ys[:-1], color=color, lw=1.2)
        axes.annotate(
            "", points[-1], points[-2],
            arrowprops={
                "arrowstyle": "-|>", "color": color, "lw": 1.2,
                "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9,
            },
        )  # fmt: skip

    return {
        "INK": INK, "FAINT": FAINT, "PAPER": PAPER, "COLORS": COLORS, "DASHES": DASHES,
        "canvas": canvas, "heatmap": heatmap, "diagram": diagram, "box": box,
        "arrow": arrow,
    }  # fmt: skip


def _svg(figure, name: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    return tidy(out.getvalue(), name.replace("/", "-"))


def tidy(svg: str, prefix: str) -> str:
    """matplotlib's SVG, fit to stand in a page: no styles of its own, its own ids."""
    svg = _FOREIGN.sub("", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    svg = re.sub(r"font: (\d+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(rf'( id="|href="#|url\(#)(?!{prefix}-)', rf"\1{prefix}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--figure-{variable})")
    [root] = _seen(etree.fromstring(svg), set(re.findall(r'#([\w-]+)[")]', svg)))
    width, height = (round(float(n)) for n in root.get("viewBox").split()[2:])
    root.attrib.clear()
    root.set("viewBox", f"0 0 {width} {height}")
    root.set("style", f"max-width: {width}px")
    return etree.tostring(root, encoding="unicode")


# The site has fonts of its own; lines have no corners; a turn by nothing is none.
_FOREIGN = re.compile(
    r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| xmlns(?::\w+)?="[^"]*"|'
    r' font-family: [^;"]*;|; stroke-linejoin: miter| transform="rotate\(-?0 [^)]*\)"',
    re.DOTALL,
)


def _seen(element, used: set[str]) -> list:
    """The element, or what it groups, or nothing if nothing of it can be seen."""
    element[:] = [part for child in element for part in _seen(child, used)]
    if element.get("id") not in used:
        element.attrib.pop("id", None)
    for name, value in element.items():  # text stays as it is
        value = re.sub(r"(opacity: )?(\d+\.\d{2,})", _rounded, value)
        element.set(name, " ".join(value.split()))
    element.text = (element.text or "").strip() or ("\n" if len(element) else None)
    element.tail = "\n"
    if element.tag == "g" and not element.attrib:
        return list(element)
    empty = element.tag in ("defs", "g") and not len(element)
    unused = element.tag == "clipPath" and not element.get("id")
    blank = element.tag == "path" and element.get("style") in _BLANK
    return [] if empty or unused or blank else [element]


_BLANK = ("fill: none", "fill: none; opacity: 0")


def _rounded(number: re.Match) -> str:
    """A coordinate to a tenth of a pixel, an opacity to a hundredth."""
    digits = 2 if number[1] else 1
    return f"{number[1] or ''}{float(number[2]):.{digits}f}"


def validate(language, inputs, options, attrs, md) -> bool:
    """Every figure has a name and a text alternative."""
    if not inputs.get("name") or not inputs.get("alt"):
        raise SuperFencesException(f"a figure needs name= and alt=, got {inputs}")
    options.update(inputs)
    return True


def lead(options) -> str:
    """The mark of the figure that opens its page (opening.py)."""
    return " data-lead" * (options.get("lead") == "yes")


def fence(source, language, css_class, options, md, **kwargs) -> str:
    """The stored drawing, in the page."""
    from tools.blocks import digest

    stored = FOLDER / f"{options['name']}.svg"
    if not stored.exists():
        raise SuperFencesException(f"{stored} is not drawn yet: make outputs")
    return place(stored, digest(source), options)


def place(stored: Path, code: str, options: dict) -> str:
    """The drawing that the code of this digest made, described."""
    alt = options["alt"].replace("&", "&amp;").replace('"', "&quot;")
    svg = stored.read_text(encoding="utf-8")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    caption = options.get("caption")
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure data-code="{code}"{lead(options)}>{svg}{below}</figure>'
