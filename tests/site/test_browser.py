"""The site as a reader meets it: by eye, by keyboard, on a phone, in the dark."""

import gzip

import pytest

from .conftest import ROOT

DESKTOP, PHONE = (1440, 900), (390, 844)
PAGE = "attention/dot-product/"
PAPER = {"light": "rgb(255, 254, 251)", "dark": "rgb(23, 24, 26)"}
LIMIT = 90_000  # bytes of HTML, CSS and JavaScript, gzipped


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_nothing_sticks_out(visit, page_path, size, scheme):
    opened = visit(page_path, width=size[0], height=size[1], scheme=scheme)
    for summary in opened.page.locator("article summary").all():
        summary.evaluate("element => element.parentElement.open = true")
    assert opened.axe() == []
    if size == PHONE:
        opened.page.set_viewport_size({"width": 360, "height": 640})
    assert opened.overflow() == 0
    background = "getComputedStyle(document.body).backgroundColor"
    assert opened.page.evaluate(background) == PAPER[scheme]


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ("<button></button>", "button-name"),
        ("<p style='color: #aaa; background: #fff'>pale</p>", "color-contrast"),
        ("<img src='data:,'>", "image-alt"),
    ],
)
def test_axe_finds_a_planted_fault(visit, html, fault):
    opened = visit("404.html")
    opened.page.evaluate(
        "html => document.querySelector('article').innerHTML += html", html
    )
    assert [line.partition(":")[0] for line in opened.axe()] == [fault]


def test_a_page_that_is_too_wide_is_found(visit):
    opened = visit(PAGE, width=360, height=640)
    opened.page.evaluate("document.querySelector('article').style.width = '400px'")
    assert opened.overflow() > 0


def test_nothing_leaves_the_site(visit, page_path):
    opened = visit(page_path)
    page = opened.page
    page.wait_for_load_state("networkidle")
    assert not any("search_index.json" in url for url in opened.requests)
    page.keyboard.press("/")
    page.keyboard.type("softmax")
    page.wait_for_selector(".md-search-result__item")
    page.keyboard.press("Escape")
    for link in page.locator("article p a[href]:not([href*='#']):visible").all()[:2]:
        link.hover()
    page.wait_for_load_state("networkidle")
    assert any("search_index.json" in url for url in opened.requests)
    assert opened.strangers() == []
    # The browser says so of the 404 page itself where the host sends that status.
    assert opened.complaints == []


def test_a_request_to_elsewhere_is_found(visit):
    opened = visit(PAGE)
    opened.page.evaluate("new Image().src = 'https://example.org/pixel.png'")
    opened.page.wait_for_load_state("networkidle")
    assert opened.strangers() == ["https://example.org/pixel.png"]
    assert len(opened.complaints) == 1


def test_search_finds_a_page(visit, base):
    page = visit("").page
    page.keyboard.press("/")
    page.keyboard.type("dot-product attention")
    first = page.locator(".md-search-result__link").first
    first.wait_for()
    assert first.get_attribute("href").startswith(base + PAGE)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{PAGE}*")


# What people type, and the page that answers it.
SOUGHT = {
    "merge lora": "lora/lora/",
    "clip grad": "foundations/gradient-clipping/",
    "backpropagation through time": "recurrent/rnn/",
    "vanishing gradients": "recurrent/rnn/",
    "weight decay adam": "regularization/l2/",
    "forget gate": "recurrent/lstm/",
    "causal mask": "attention/dot-product/",
    "tied embedding": "regularization/weight-sharing/",
    "rope": "attention/positional-encoding/",
    "receptive field": "convolution/feature-hierarchy/",
    "patience": "regularization/early-stopping/",
    "KV cache memory": "kv-cache/cache/",
    "softmax temperature": "test-time/temperature/",
    "top p": "test-time/temperature/",
}


@pytest.mark.parametrize("words", SOUGHT)
def test_what_people_type_is_among_the_first_three(visit, base, words):
    page = visit("").page
    page.keyboard.press("/")
    page.keyboard.type(words)
    results = page.locator(".md-search-result__item")
    results.first.wait_for()
    page.wait_for_timeout(300)  # it sorts as one types
    first = results.locator("a.md-search-result__link").evaluate_all(
        "links => links.map(link => link.href.split('?')[0].split('#')[0])"
    )
    assert base + SOUGHT[words] in list(dict.fromkeys(first))[:3]


def test_the_search_index_is_light(site):
    index = (site / "search/search_index.json").read_bytes()
    pages = len(list(site.rglob("index.html")))
    assert len(gzip.compress(index)) <= 2_000 * pages


def test_hovering_a_link_shows_where_it_leads(visit):
    page = visit("").page
    page.locator("article a[href$='notes/']").first.hover()
    preview = page.locator(".md-tooltip2--active")
    preview.wait_for()
    assert "The notes, annotated" in preview.inner_text()


def test_hovering_a_judged_phrase_shows_what_is_right(visit):
    page = visit("notes/").page
    page.locator("a.mark[href$='#c78']").first.hover()
    preview = page.locator(".md-tooltip2--active")
    preview.wait_for()
    assert "loosely put" in preview.inner_text()


def test_the_scheme_is_the_systems_until_the_reader_chooses(visit):
    page = visit("", scheme="dark", locale="en-GB").page  # it remembers: own profile
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{background} === '{PAPER['light']}'")
    page.get_by_title("Switch to light").click()
    page.get_by_title("Switch to dark").click()
    page.wait_for_function(f"{background} === '{PAPER['dark']}'")
    page.reload()
    page.wait_for_function(f"{background} === '{PAPER['dark']}'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_needs_no_javascript(visit, base, scheme):
    opened = visit(scheme=scheme, java_script_enabled=False)
    opened.page.goto(base)
    background = "getComputedStyle(document.body).backgroundColor"
    assert opened.page.evaluate(background) == PAPER[scheme]


def test_the_copy_button_copies_the_code_and_nothing_else(visit):
    opened = visit(PAGE, permissions=["clipboard-read", "clipboard-write"])
    page = opened.page
    snippet = (ROOT / "snippets/attention/dot_product.py").read_text(encoding="utf-8")
    page.get_by_text("The whole file").click()
    file = page.locator(".language-python:has(.filename)")
    button = file.locator(".md-code__button")
    button.focus()  # by keyboard: visible as soon as it has the focus
    assert (
        file.locator(".md-code__nav").evaluate("e => getComputedStyle(e).opacity")
        == "1"
    )
    page.keyboard.press("Enter")
    page.wait_for_selector(".md-dialog--active")
    assert page.evaluate("navigator.clipboard.readText()") == snippet.rstrip("\n")
    assert page.locator(".language-text .md-code__button:visible").count() == 0


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit):
    page = visit(PAGE).page
    page.wait_for_load_state("networkidle")  # the frame's script sets the focus back
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.md-skip')")
    page.keyboard.press("Enter")
    page.wait_for_function("scrollY > 0")  # only then does the focus start there
    reached, outside = set(), 0
    while outside < 3:  # the browser may stop at the page itself before the text
        page.keyboard.press("Tab")
        found = page.evaluate("""() => {
            const focused = document.activeElement, style = getComputedStyle(focused)
            const outline = style.outlineStyle === "none" ? "0" : style.outlineWidth
            return [focused.closest("article") && focused.tagName, parseFloat(outline)]
        }""")
        if found[0] is None:
            outside += 1
            continue
        reached.add(found[0])
        assert found[1] >= 2, found
    assert {"A", "BUTTON", "SUMMARY"} <= reached


def test_88_columns_of_code_fit_on_a_desktop(visit):
    page = visit(PAGE).page
    overflow = """([selector, columns]) => {
        const code = document.querySelector(selector)
        code.textContent = "x".repeat(columns)
        return code.scrollWidth - code.clientWidth
    }"""
    for selector in ("article > .highlight pre code", "article li details pre code"):
        page.locator("details").evaluate_all(
            "all => all.forEach(one => one.open = true)"
        )
        assert page.evaluate(overflow, [selector, 88]) <= 0, selector
        assert page.evaluate(overflow, [selector, 140]) > 0, "it measures nothing"


def test_lines_of_text_have_60_to_80_characters(visit):
    page = visit(PAGE).page
    lengths = page.locator("article > p").evaluate_all("""all => all.map(p => {
        const lines = p.offsetHeight / parseFloat(getComputedStyle(p).lineHeight)
        return lines > 2.5 ? p.textContent.length / lines : 0
    })""")
    longest = max(lengths)
    assert 60 <= longest <= 80


def test_formulas_are_mathml_set_in_the_maths_font(visit):
    page = visit("attention/residual/").page
    assert page.evaluate("""[...document.fonts].some(
        font => font.family.includes("STIX Two Math") && font.status === "loaded")""")
    formulas = page.locator("math")
    assert formulas.count() > 5
    height = "all => all.map(one => one.getBoundingClientRect().height)"
    assert min(formulas.evaluate_all(height)) > 4
    # Without the font's own tables brackets don't grow around a fraction: all the
    # parentheses of the page would be equally high.
    brackets = page.locator(".formula mo", has_text="(").evaluate_all(height)
    assert max(brackets) > 1.8 * min(brackets)
    named = "getComputedStyle(document.querySelector('math')).fontFamily"
    assert "STIX Two Math" in page.evaluate(named)


def test_pages_without_formulas_don_t_load_the_maths_font(visit):
    opened = visit("404.html")
    opened.page.wait_for_load_state("networkidle")
    assert not any(url.endswith(".woff2") for url in opened.requests)


def test_a_lost_reader_is_helped(visit, base):
    opened = visit()
    answer = opened.page.goto(f"{base}no/such/page/")
    assert answer.status == 404
    opened.page.wait_for_selector("html.js")
    assert "isn't here" in opened.page.locator("h1").inner_text()
    links = opened.page.locator("article a")
    assert links.count() >= 3
    links.first.click()
    opened.page.wait_for_url(base)


def test_pages_are_light(visit, site, base, page_path):
    opened = visit(page_path)
    opened.page.wait_for_load_state("networkidle")
    weights = {}
    for url in dict.fromkeys(opened.requests):
        name = url.removeprefix(base).partition("?")[0]
        name += "index.html" if not name or name.endswith("/") else ""
        if name.endswith((".html", ".css", ".js")):
            weights[name] = len(gzip.compress((site / name).read_bytes()))
    assert any(name.endswith(".css") for name in weights)
    live = opened.page.locator("live-figure").count() > 0
    assert sum(weights.values()) <= LIMIT + 12_000 * live, weights


def test_nothing_but_a_hair_follows_a_root(visit):
    """Once browsers leave no gap there, the rule for msqrt makes it negative."""
    page = visit("foundations/linear/").page
    size = page.evaluate(
        "parseFloat(getComputedStyle(document.querySelector('math')).fontSize)"
    )
    gaps = page.locator("msqrt:not(:has(mfrac))").evaluate_all("""all => all.map(
        root => {
            const next = [root, root.parentElement].map(one => one.nextElementSibling)
                .find(one => one)
            const inside = [...root.querySelectorAll("*")].at(-1)
            return next && [next, inside].map(one => one.getBoundingClientRect())
        }).filter(found => found).map(([next, inside]) => next.left - inside.right)""")
    assert gaps and all(-0.1 < gap / size < 0.2 for gap in gaps)
