"""MkDocs hooks: drop what no page can use of the style sheets and of the code.

A selector stays if each of its classes and ids is one of a page, or a word of a script
that makes elements. The search index is loaded when the search is opened, not with
every page. This module is a hook of its own: without it the site is heavier, no more.
"""

import re
from pathlib import Path

_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_VARIABLE = re.compile(r'(?<=[{;])(--[\w-]+):(?:url\("[^"]*"\)|[^;{}"]*);?')
_RULE = re.compile(r"([^{}]+)\{((?:[^{}]|\{[^{}]*\})*)\}")


# What Material's script could make; a part that no page has is not used here.
_PARTS = (
    "md-annotation",
    "md-banner",
    "md-consent",
    "md-feedback",
    "md-source__",
    "md-status",
    "md-tabs",
    "md-tag",
    "md-version",
    "mermaid",
    "tabbed",
)

# Unless true comes first here, the script waits until the search is opened.
_EAGER = re.compile(r'([$\w]+)\(location\.protocol!=="file:"\)')

# Names, spaces, points and signs have the colour of the text around them.
_PLAIN = re.compile(r'<span class="(?:n|o|p|w)">([^<]*)</span>')


def on_post_page(output, page, config):
    return _PLAIN.sub(r"\1", output)


def on_post_build(config):
    site = Path(config.site_dir)
    for path in site.glob("assets/javascripts/bundle.*.js"):
        js, found = _EAGER.subn(r"\1(!1)", path.read_text(encoding="utf-8"))
        if found != 1:
            raise ValueError(f"{path.name} loads the search index in another way")
        path.write_text(js, encoding="utf-8")
    scripts = [p for p in site.glob("assets/**/*.js") if "lunr" not in p.parts]
    words: set[str] = set()
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        for names in re.findall(r'\b(?:class|id)="([^"]*)"', html):
            words |= set(names.split())
    unused = tuple(p for p in _PARTS if not any(w.startswith(p) for w in words))
    for path in scripts:
        found = re.findall(r"[\w-]+", path.read_text(encoding="utf-8"))
        words |= {word for word in found if not word.startswith(unused)}
    own = (site / "assets/style.css").read_text(encoding="utf-8")
    for path in site.glob("assets/stylesheets/main.*.css"):
        css = slim(path.read_text(encoding="utf-8"), words)
        path.write_text(_without_unused_variables(css, own), encoding="utf-8")
    for path in (site / "assets/style.css", site / "assets/live/live.css"):
        css = _COMMENT.sub("", path.read_text(encoding="utf-8"))
        path.write_text(re.sub(r"\s+", " ", css), encoding="utf-8")


def _without_unused_variables(css: str, own: str) -> str:
    used = set(re.findall(r"var\(\s*(--[\w-]+)", css + own))
    less = _VARIABLE.sub(lambda found: found[0] * (found[1] in used), css)
    # One may have been all that used another.
    return css if less == css else _without_unused_variables(less, own)


def slim(css: str, words: set[str]) -> str:
    def rule(match: re.Match) -> str:
        selector, body = match.groups()
        if selector.lstrip().startswith(("@media", "@supports")):
            body = slim(body, words)
        elif not selector.lstrip().startswith("@"):
            parts = re.split(r",(?![^(\[]*[)\]])", selector)
            selector = ",".join(part for part in parts if _usable(part, words))
        return f"{selector}{{{body}}}" if selector and body else ""

    return _RULE.sub(rule, _COMMENT.sub("", css))


def _usable(selector: str, words: set[str]) -> bool:
    if "[dir=rtl]" in selector:
        return False
    bare = re.sub(r":not\([^)]*\)|\[[^\]]*\]", "", selector)
    names = re.findall(r"[.#]([A-Za-z_][\w-]*)", bare)
    return all(name in words for name in names)
