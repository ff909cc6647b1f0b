"""How a page opens and how tall it is, at 1280 by 900, with its folds closed."""

SCREEN = 900  # pixels
SCREENS = 9
MODEL = "attention/dot-product/"


def opening(page) -> float:
    """Where the picture that opens the page ends, its caption not counted."""
    return page.locator("figure[data-lead]").evaluate("""figure => {
        const drawn = [...figure.children].filter(e => e.tagName !== "FIGCAPTION")
        return Math.max(...drawn.map(e => e.getBoundingClientRect().bottom)) + scrollY
    }""")


def height(page) -> float:
    """From the top to the stamp of the last run."""
    return page.locator("aside.stamp").evaluate(
        "stamp => stamp.getBoundingClientRect().top + scrollY"
    )


def test_the_picture_is_on_the_first_screen_and_the_page_has_an_end(visit, page_path):
    page = visit(page_path, width=1280, height=SCREEN).page
    experiment = page_path.startswith("labs/")  # as tall as what it measures
    if page.locator("figure[data-lead]").count() and not experiment:
        assert opening(page) <= SCREEN
        assert height(page) <= SCREENS * SCREEN


def test_a_picture_too_low_and_a_page_too_tall_are_found(visit):
    page = visit(MODEL, width=1280, height=SCREEN).page
    assert opening(page) <= SCREEN and height(page) <= SCREENS * SCREEN
    page.evaluate("document.querySelector('h1').style.marginBottom = '900px'")
    assert opening(page) > SCREEN
    page.evaluate("document.querySelector('h1').style.marginBottom = '9000px'")
    assert height(page) > SCREENS * SCREEN


def test_the_picture_opens_the_page_without_javascript(visit, base):
    opened = visit(width=1280, height=SCREEN, java_script_enabled=False)
    opened.page.goto(base + MODEL)
    assert 0 < opening(opened.page) <= SCREEN


def test_a_line_of_the_formula_and_its_code_mark_each_other(visit):
    page = visit(MODEL).page
    row, line = page.locator("mtr.n2"), page.locator(".core .n2")

    def marked() -> list[bool]:
        plain = "rgba(0, 0, 0, 0)"
        color = "e => getComputedStyle(e).backgroundColor"
        return [one.evaluate(color) != plain for one in (row, line)]

    assert marked() == [False, False]
    for one in (row, line):
        one.hover()
        assert marked() == [True, True]
        page.mouse.move(0, 0)
        assert marked() == [False, False]
        one.focus()
        assert marked() == [True, True]
        one.evaluate("e => e.blur()")
    assert "(2)" in row.text_content() and "# (2)" in line.inner_text()
