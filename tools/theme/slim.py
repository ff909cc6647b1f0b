"""MkDocs hooks: drop what no page can use, of Material's stylesheet and of the code.

A selector stays if each of its classes and ids is a word of some page or script. What
is not listed in `hooks` does nothing: without it the site is 8 KB heavier, no more.
"""

import re
from pathlib import Path

_RULE = re.compile(r"([^{}]+)\{((?:[^{}]|\{[^{}]*\})*)\}")


# Names, spaces, points and signs have the colour of the text around them.
_PLAIN = re.compile(r'<span class="(?:n|o|p|w)">([^<]*)</span>')


def on_post_page(output, page, config):
    return _PLAIN.sub(r"\1", output)


def on_post_build(config):
    site = Path(config.site_dir)
    scripts = [p for p in site.glob("assets/**/*.js") if "lunr" not in p.parts]
    words: set[str] = set()
    for path in [*site.rglob("*.html"), *scripts]:
        words |= set(re.findall(r"[\w-]+", path.read_text(encoding="utf-8")))
    for path in site.glob("assets/stylesheets/main.*.css"):
        css = slim(path.read_text(encoding="utf-8"), words)
        used = set(re.findall(r"var\(\s*(--[\w-]+)", css))
        own = (site / "assets/style.css").read_text(encoding="utf-8")
        used |= set(re.findall(r"var\(\s*(--[\w-]+)", own))
        unused = r'(?<=[{;])(--[\w-]+):(?:url\("[^"]*"\)|[^;{}"]*);?'
        for match in [m for m in re.finditer(unused, css) if m[1] not in used]:
            css = css.replace(match[0], "")
        path.write_text(css, encoding="utf-8")


def slim(css: str, words: set[str]) -> str:
    def rule(match: re.Match) -> str:
        selector, body = match.groups()
        if selector.lstrip().startswith(("@media", "@supports")):
            body = slim(body, words)
        elif not selector.lstrip().startswith("@"):
            parts = re.split(r",(?![^(\[]*[)\]])", selector)
            selector = ",".join(part for part in parts if _usable(part, words))
        return f"{selector}{{{body}}}" if selector and body else ""

    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    return _RULE.sub(rule, css)


def _usable(selector: str, words: set[str]) -> bool:
    if "[dir=rtl]" in selector:
        return False
    bare = re.sub(r":not\([^)]*\)|\[[^\]]*\]", "", selector)
    names = re.findall(r"[.#]([A-Za-z_][\w-]*)", bare)
    return all(name in words for name in names)
