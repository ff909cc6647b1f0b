"""The drawing of a figure: the same in the page and in the stored figure."""

import pytest
import torch
from bs4 import BeautifulSoup

from tools import views
from tools.controls import text
from tools.javascript import LIVE

OUTPUTS = {
    "matrix": torch.tensor([[0.125, -0.375, 2.5], [-0.001, 1e-9, -1e-9]]),
    "stack": torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)),
    "masked": torch.tensor([[True, False, False], [False, True, False]]),
    "vector": torch.tensor([0.25, -0.5, 3.0]),
    "points": torch.tensor([[1.0, 0.5], [-0.25, 9.0]]),
    "radius": torch.tensor(0.5),
}
VIEWS = [
    views.heatmap("matrix", ["a", "b"], "said", "masked", digits=0, marked="masked"),
    views.heatmap("stack", title=["one", "two"], top=2),
    views.lines({"up": "vector", "down": "vector"}, range(3), ylim=(-1, 1)),
    views.bars("vector", ["a", "b", 'x < "y" & z'], ylim=(-0.3, 0.3), ylabel="size"),
    views.scatter("points", (-2, 2), (-1, 1), ["a"], arrows=True, ring="radius"),
    views.network("matrix", ["a", "b"], "said"),
]
WORDS = {"said": text("to  be", 3, ["be"]).words()}


def drawn(view):
    return BeautifulSoup(views.draw(view, OUTPUTS, WORDS), "html.parser")


def test_a_browser_draws_what_is_stored(launch):
    tensors = {
        name: {"shape": list(x.shape), "data": x.double().flatten().tolist()}
        for name, x in OUTPUTS.items()
    }
    browser = launch()
    found = browser.new_page().evaluate(
        """async ([code, views, ...given]) => {
            const blob = new Blob([code], { type: "text/javascript" })
            const { draw } = await import(URL.createObjectURL(blob))
            return views.map(view => draw(view, ...given))
        }""",
        [(LIVE / "draw.js").read_text("utf-8"), VIEWS, tensors, WORDS],
    )
    browser.close()
    assert len(found) == len(VIEWS)
    for view, html in zip(VIEWS, found, strict=True):
        assert f">{html}</div>" in views.draw(view, OUTPUTS, WORDS), view["kind"]


def test_a_table_prints_minus_dot_and_no_negative_zero():
    table = drawn(views.heatmap("matrix", hidden="masked"))
    shown = [cell.get_text() for cell in table.select("td")]
    assert shown == ["·", "−0.38", "2.50", "0.00", "·", "0.00"]
    negative = [cell.get_text() for cell in table.select("td.negative")]
    assert negative == ["−0.38"]  # and not what is 0 but for rounding


def test_where_no_word_is_no_column_is():
    table = drawn(VIEWS[0])
    heads = [(c.get_text(), c.has_attr("hidden")) for c in table.select("thead th")]
    assert heads == [("to", False), ("be", False), ("", True)]
    hidden = [cell.has_attr("hidden") for cell in table.select("tbody td")]
    assert hidden == [False, False, True] * 2


def test_axes_have_round_numbers():
    labels = [
        [label for _, label in views.lines({}, range(2), ylim=limits)["yticks"]]
        for limits in ((0, 1), (-1, 1), (0, 0.6), (-8, 2), (0, 2000))
    ]
    assert labels == [
        ["0", "0.2", "0.4", "0.6", "0.8", "1"],
        ["−1", "0", "1"],
        ["0", "0.2", "0.4", "0.6"],
        ["−8", "−6", "−4", "−2", "0", "2"],
        ["0", "1000", "2000"],
    ]


def test_a_label_is_shown_as_it_is():
    chart = drawn(VIEWS[3]).svg
    assert chart["aria-label"] == 'a 0.25, b −0.50, x < "y" & z 3.00.'
    assert 'x < "y" & z' in [label.get_text() for label in chart.select("text")]


def test_what_has_no_label_is_no_header():
    table = drawn(views.heatmap("matrix", ["a", ""], ["", "b", "c"]))
    heads = [cell.get_text() for cell in table.select("th")]
    assert heads == ["b", "c", "a"]
    assert [len(row.select("th, td")) for row in table.select("tr")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (views.bars("vector", ["a", "b"]), "labels: 2 labels for 3 values"),
        (views.heatmap("matrix", range(3)), "rows: 3 labels for 2 values"),
        (views.heatmap("vector", None, "said"), "columns: 3 labels for 2 values"),
        (views.lines({"up": "vector"}, [0, 1]), "up: 3 values where x has 2"),
    ],
)
def test_labels_and_curves_fit_what_they_stand_for(view, message, refuses):
    outputs = OUTPUTS | ({"vector": torch.ones(1, 2)} if "columns" in view else {})
    with refuses(ValueError, message):
        views.draw(view, outputs, WORDS)


def test_a_word_is_its_place_in_the_list_or_behind_it():
    ids = text("The cat purrs", 4, ["the", "cat"]).tensor()
    assert ids.tolist() == [0, 1, 2, -1] and ids.dtype == torch.int64
