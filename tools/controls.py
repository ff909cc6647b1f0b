"""The controls of a live figure: what the reader can move, and the tensor it gives."""

import html
from collections.abc import Callable
from dataclasses import dataclass

from tools.javascript import javascript


@dataclass
class Control:
    value: object
    dtype: str
    label: str
    draw: Callable[[str, str], str]  # the HTML, of its attributes and its label
    slots: int = 0
    known: list[str] | None = None
    name: str = ""

    def words(self) -> list[str | None]:
        return javascript("draw.js", "words", self.value, self.slots)

    def tensor(self):
        import torch

        value = self.value
        if self.known is not None:
            value = javascript("draw.js", "ids", self.words(), self.known)
        return torch.tensor(value, dtype=getattr(torch, self.dtype))

    def spec(self) -> dict:
        """What live.js must know to read it."""
        known = {} if self.known is None else {"known": self.known}
        return {"shape": list(self.tensor().shape), "dtype": self.dtype} | known

    def html(self) -> str:
        label = html.escape(self.label or self.name)
        return self.draw(f'data-input="{self.name}"', label)


def slider(low, high, value, step=None, label=""):
    """A number; a 0-d float32 tensor."""
    return Control(value, "float32", label, lambda data, label:
        f'<label {data}>{label} <input type="range" min="{low}" max="{high}" '
        f'step="{step or (high - low) / 100}" value="{value}">'
        f'<span class="value">{value}</span></label>')  # fmt: skip


def choice(labels, value=0, label=""):
    """One of several; the 0-d int64 tensor of its position."""
    options = "".join(
        f"<option{' selected' * (n == value)}>{html.escape(str(option))}</option>"
        for n, option in enumerate(labels)
    )
    return Control(value, "int64", label, lambda data, label:
        f"<label {data}>{label} <select>{options}</select></label>")  # fmt: skip


def toggle(value, label=""):
    """On or off; a 0-d bool tensor."""
    return Control(bool(value), "bool", label, lambda data, label:
        f'<label {data}><input type="checkbox"{" checked" * bool(value)}> '
        f"{label}</label>")  # fmt: skip


def text(value, slots, vocabulary, label=""):
    """Words as ids: int64 of length `slots`, -1 where there is no word.

    `vocabulary` lists the words that are known; all others have the id behind them.
    """
    return Control(value, "int64", label, lambda data, label:
        f'<label {data}>{label} <input type="text" value="{html.escape(value)}" '
        'autocomplete="off" spellcheck="false"></label>',
        slots, vocabulary)  # fmt: skip


def numbers(rows, label=""):
    """An editable matrix, float32."""
    return _matrix(rows, label, lambda x: f'type="number" step="any" value="{x:g}"')


def pixels(rows, label=""):
    """A matrix of squares to switch on and off, float32: 0 or 1."""
    ink = [[bool(x) for x in row] for row in rows]
    return _matrix(ink, label, lambda x: 'type="checkbox"' + " checked" * x)


def _matrix(rows, label: str, cell: Callable) -> Control:
    def draw(data, label):
        drawn = ""
        for i, row in enumerate(rows, 1):
            at = f'aria-label="{label}, row {i}, column'
            cells = [f'<input {cell(x)} {at} {j}">' for j, x in enumerate(row, 1)]
            drawn += f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"
        return f'<table class="cells" {data}><caption>{label}</caption>{drawn}</table>'

    return Control(rows, "float32", label, draw)
