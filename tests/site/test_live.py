"""Live figures as a reader moves them: the page shows what torch computes."""

import gzip
import json
import random
import re

import pytest
import torch
from bs4 import BeautifulSoup

from tools import export

from .conftest import ROOT

FIGURES = ROOT / "docs/assets/figures"
WEIGHTS, TRAINING = "attention/dot-product/", "attention/residual/"
LINES, VECTOR = "recurrent/rnn/", "foundations/gradient-clipping/"
PIXELS = "convolution/feature-hierarchy/"


def graph_of(name: str) -> dict:
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def ready(opened):
    opened.page.locator("live-figure").scroll_into_view_if_needed()
    opened.page.wait_for_selector("live-figure[data-ready]")
    return opened.page


def far_away(visit, path):
    """The page with its figure further down than a browser looks ahead."""
    opened = visit()
    opened.page.add_init_script("""
        const far = new CSSStyleSheet()
        far.replaceSync("figure.live { margin-top: 3000px !important }")
        document.adoptedStyleSheets = [far]""")
    return opened.go(path)


def cells(page, table=0) -> list[list[str]]:
    """The numbers that a table shows."""
    return (
        page.locator(".view table")
        .nth(table)
        .evaluate(
            """table => [...table.tBodies[0].rows].filter(row => !row.hidden).map(
            row => [...row.querySelectorAll("td:not([hidden])")].map(
                cell => cell.textContent))"""
        )
    )


def printed(matrix, digits=2) -> list[list[str]]:
    rows = [[f"{value:.{digits}f}" for value in row] for row in matrix.tolist()]
    return [
        [n.lstrip("-") if float(n) == 0 else n.replace("-", "−") for n in row]
        for row in rows
    ]


def move(page, name: str, value: float) -> None:
    page.locator(f"[data-input={name}] input").evaluate(
        """(input, value) => {
            input.value = value
            input.dispatchEvent(new Event("input", { bubbles: true }))
        }""",
        value,
    )


def test_at_ten_settings_the_figure_shows_what_torch_computes(visit):
    page, spec = ready(visit(WEIGHTS)), graph_of("dot-product/weights")
    ids = torch.tensor(page.evaluate("""[...document.querySelector("live-figure")
        .read().tokens.data]""")).long()  # fmt: skip
    length = int((ids >= 0).sum())
    page.get_by_label("causal mask").uncheck()
    draw = random.Random(0)
    for _ in range(10):
        temperature = draw.randrange(1, 41) / 10  # the slider moves in tenths
        move(page, "temperature", temperature)
        inputs = {"tokens": ids, "temperature": torch.tensor(temperature)}
        found = export.run(spec["graph"], inputs | {"causal": torch.tensor(False)})
        assert cells(page) == printed(found["weights"][:length, :length])


def test_new_words_are_new_rows_and_a_masked_cell_is_a_dot(visit):
    page = ready(visit(WEIGHTS))
    words = page.get_by_label("Tokens")
    words.fill("The bird and nobody sang")
    rows = cells(page)
    assert [len(row) for row in rows] == [5] * 5
    assert rows[0] == ["1.00", "·", "·", "·", "·"]
    assert page.locator(".view tbody th:visible").all_inner_texts() == [
        "The", "bird", "and", "nobody", "sang",
    ]  # fmt: skip
    ids = page.evaluate("[...document.querySelector('live-figure').read().tokens.data]")
    assert ids == [0, 6, 1, 14, 11, -1, -1]  # "nobody" is unknown, as all others are
    page.get_by_label("causal mask").uncheck()
    assert not any("·" in row for row in cells(page))
    words.fill("")  # nobody there: an empty table, not an error
    assert cells(page) == []


def test_the_keyboard_moves_a_figure(visit):
    page = ready(visit(WEIGHTS))
    page.get_by_label("Tokens").focus()
    before = cells(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    shown = page.locator("[data-input=temperature] .value")
    assert shown.inner_text() == "1.5"
    assert cells(page) != before
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert not any("·" in row for row in cells(page))


def test_a_pixel_is_switched_by_mouse_or_key_and_the_map_is_that_of_torch(visit):
    page, spec = ready(visit(PIXELS)), graph_of("feature-hierarchy/kernel")
    boxes = page.locator(".cells [type=checkbox]")
    on = boxes.evaluate_all("boxes => boxes.map(box => box.checked)")
    image = torch.tensor(on).view(8, 8).float()
    before = cells(page, 3)

    def shown():
        inputs = {"kernel": torch.tensor(1), "row": torch.tensor(2.0), "image": image}
        return export.run(spec["graph"], inputs | {"column": torch.tensor(6.0)})

    page.locator("live-figure select").select_option("horizontal edges")
    move(page, "row", 2)
    move(page, "column", 6)
    pixel = page.get_by_label("Image, row 3, column 7")
    image[2, 6] = 1 - image[2, 6]
    pixel.click()
    assert pixel.is_checked() == bool(image[2, 6])
    assert cells(page, 3) == printed(shown()["map"], 1) != before
    assert [cells(page, 1), cells(page, 2)] == [printed(m) for m in shown()["pair"]]
    # The next one to the right, without the mouse
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    image[2, 7] = 1 - image[2, 7]
    assert cells(page, 0) == printed(image, 0)
    assert cells(page, 3) == printed(shown()["map"], 1)


def test_the_window_and_its_number_are_marked(visit):
    page = ready(visit(PIXELS))
    marked = """table => [...table.tBodies[0].rows].map(row =>
        [...row.cells].map(cell => cell.ariaCurrent === "true"))"""
    for row, column in ((3, 2), (6, 1)):
        move(page, "row", row)
        move(page, "column", column)
        window, number = torch.zeros(8, 8).bool(), torch.zeros(6, 6).bool()
        window[row - 1 : row + 2, column - 1 : column + 2] = True
        number[row - 1, column - 1] = True
        tables = page.locator(".view table")
        assert tables.nth(0).evaluate(marked) == window.tolist()
        assert tables.nth(3).evaluate(marked) == number.tolist()
        assert tables.nth(1).locator("[aria-current]").count() == 0
    framed = page.locator("td[aria-current=true]").first
    assert framed.evaluate("cell => getComputedStyle(cell).outlineStyle") == "solid"


def test_training_in_the_page_is_training_in_torch(visit):
    page, steps = ready(visit(TRAINING)), graph_of("residual/depth")["train"]
    curve, counted = page.locator("polyline.s2"), page.locator(".buttons output")
    by_torch = curve.get_attribute("points")  # drawn when the site was made
    page.get_by_role("button", name="Train").click()
    page.get_by_role("button", name="Stop").click()
    done = int(counted.inner_text().split()[0])
    assert done < steps
    page.get_by_role("button", name="Train").click()
    page.wait_for_function(
        f"document.querySelector('.buttons output').value.startsWith('{steps} ')"
    )
    points = [
        [float(number) for pair in found.split() for number in pair.split(",")]
        for found in (by_torch, curve.get_attribute("points"))
    ]
    assert len(points[0]) == len(points[1]) == 2 * steps
    assert max(abs(a - b) for a, b in zip(*points, strict=True)) <= 0.2
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function(
        "document.querySelector('.buttons output').value.startsWith('1 ')"
    )
    said = page.locator("live-figure svg").get_attribute("aria-label")
    assert re.fullmatch(
        r"(\w+ skip: from ([\d.]+) to \2, lowest \2, highest \2\. ?){2}", said
    )


def test_a_chart_says_what_it_shows_now(visit):
    page, spec = ready(visit(LINES)), graph_of("rnn/memory")
    chart = page.locator("live-figure svg")
    before = chart.get_attribute("aria-label")
    move(page, "weight", 0.8)
    start = page.locator("[data-input=start] input").input_value()
    inputs = {"weight": torch.tensor(0.8), "start": torch.tensor(float(start))}
    found = export.run(spec["graph"], inputs)
    last = [f"{found[name][-1].item():.2f}" for name in ("state", "gradient")]
    after = chart.get_attribute("aria-label")
    assert before.startswith("state hₜ: from 1.00 to ") and after != before
    assert re.findall(r" to ([\d.]+),", after) == last


def test_vectors_and_their_circle_are_where_torch_puts_them(visit):
    page, spec = ready(visit(VECTOR)), graph_of("gradient-clipping/vector")
    chart, ring = page.locator("live-figure svg"), page.locator("live-figure .ring")
    width = float(ring.get_attribute("rx"))
    move(page, "first", -3)
    move(page, "second", 0.5)
    page.get_by_label("max_norm").select_option("2.0")
    inputs = {"first": torch.tensor(-3.0), "second": torch.tensor(0.5)}
    found = export.run(spec["graph"], inputs | {"bound": torch.tensor(2)})
    (a, b), (c, d) = (
        [x.replace("-", "−") for x in p] for p in printed(found["vectors"])
    )
    said = chart.get_attribute("aria-label")
    assert said == f"before at {a}, {b}; after at {c}, {d}."
    assert float(ring.get_attribute("rx")) == pytest.approx(2 * width, abs=0.1)
    # Both lines end at the origin, where the circle has its centre.
    centre = float(ring.get_attribute("cx")), float(ring.get_attribute("cy"))
    for point in page.locator(".scatter g:has(line):not(.axes)").all():
        at = re.findall(r"-?[\d.]+", point.get_attribute("transform"))
        line = point.locator("line")
        ends = [float(line.get_attribute(name)) for name in ("x2", "y2")]
        ends = [float(n) + end for n, end in zip(at, ends, strict=True)]
        assert ends == pytest.approx(centre, abs=0.1)


def test_without_javascript_the_figure_shows_its_default(
    visit, site, base, figure_path
):
    opened = visit(java_script_enabled=False)
    opened.page.goto(base + figure_path)
    assert opened.page.locator("live-figure fieldset").is_hidden()
    without = BeautifulSoup(opened.page.content(), "html.parser")
    page = ready(visit(figure_path))
    page.wait_for_timeout(100)
    marks = [row.get("aria-current") for row in without.select(".view td")]
    assert marks == page.locator(".view td").evaluate_all(
        "all => all.map(cell => cell.ariaCurrent)"
    )
    for kind in (".view td", ".view polyline", ".view svg[role=img]"):
        shown = page.locator(kind).evaluate_all(
            """all => all.map(e => e.hidden ? "" : e.getAttribute("points")
                ?? e.getAttribute("aria-label") ?? e.textContent)"""
        )
        static = [
            ""
            if tag.has_attr("hidden")
            else tag.get("points") or tag.get("aria-label") or tag.get_text()
            for tag in without.select(kind)
        ]
        assert len(shown) == len(static)
        if kind == ".view polyline":
            continue  # rounded at build, and at 3:1 pixels nobody sees the difference
        assert shown == static


def test_figures_load_their_code_only_where_there_is_one(visit):
    opened = visit("notes/")
    opened.page.wait_for_load_state("networkidle")
    assert not [url for url in opened.requests if "/live/" in url]
    opened = far_away(visit, WEIGHTS)
    opened.page.wait_for_load_state("networkidle")
    assert not [url for url in opened.requests if "executor" in url]  # not near yet
    ready(opened)
    assert [url for url in opened.requests if "executor" in url]
    assert opened.strangers() == [] and opened.complaints == []


def test_a_figure_comes_alive_after_instant_navigation(visit):
    opened = visit("")
    page = opened.page
    page.locator("article a[href*='dot-product']").first.click()
    page.wait_for_url(f"**/{WEIGHTS}**")
    # The page that is left has a figure, too.
    page.locator("live-figure[data-name='dot-product/weights']").wait_for()
    ready(opened)
    page.get_by_label("causal mask").uncheck()
    assert not any("·" in row for row in cells(page))
    colour = (
        "getComputedStyle(document.querySelector('.view tbody td')).backgroundColor"
    )
    page.wait_for_function(f"{colour} !== 'rgba(0, 0, 0, 0)'")


def test_figures_are_quick(visit, figure_path):
    started = """new Promise(done => {
        const figure = document.querySelector("live-figure"), start = performance.now()
        new MutationObserver(() => done(performance.now() - start))
            .observe(figure, { attributeFilter: ["data-ready"] })
        figure.scrollIntoView()
    })"""
    times = []
    for _ in range(3):  # the best of three: other work of the machine doesn't count
        opened = far_away(visit, figure_path)
        times.append(opened.page.evaluate(started))
    assert min(times) <= 200
    each = """(() => {
        const figure = document.querySelector("live-figure"), { spec, graph } = figure
        const state = spec.train ? figure.initial() : {}
        const times = Array.from({ length: 151 }, () => {
            const start = performance.now()
            if (spec.train) graph.run({ ...figure.read(), ...state })
            else figure.update()
            return performance.now() - start
        })
        // The fastest: other work of the machine doesn't count
        return Math.min(...times)
    })()"""
    assert opened.page.evaluate(each) <= 5


def test_the_code_of_figures_is_light(site):
    files = sorted((site / "assets/live").iterdir())
    names = ["draw.js", "executor.js", "live.css", "live.js"]
    assert [file.name for file in files] == names
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) <= 12_000
