"""How long the site takes to build, what our own extensions add, what its pages weigh.

    python -m tools.bench

Fails where a limit of the house is passed: a build 1.5 times as long as the same pages
take without our extensions and hooks, or a text page above 90 KB (gzipped HTML, CSS and
JavaScript; 12 KB more where a live figure runs). The limit leaves out what can be read
without: the font, what a live figure computes, and the search index, which is loaded
when the search is opened. Their size stands at the end.
"""

import gzip
import logging
import re
import sys
import tempfile
import time
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

RUNS = 7
SLOWER, TEXT_PAGE, LIVE = 1.5, 90_000, 12_000
LEFT_OUT = {
    "the font for formulas": "assets/fonts/*.woff2",
    "the largest graph of a live figure": "assets/figures/*/*.json",
    "the search index": "search/search_index.json",
}


def configuration(folder: str, own: bool):
    """The site's configuration, with or without what this project adds to MkDocs."""
    config = load_config("mkdocs.yml", site_dir=folder)
    if not own:
        names = config.markdown_extensions
        config.markdown_extensions = [n for n in names if not n.startswith("tools.")]
        config.mdx_configs["pymdownx.superfences"]["custom_fences"] = []
        for event, methods in config.plugins.events.items():
            hooks = {f for f in methods if f.__module__ in config.hooks}
            config.plugins.events[event] = [f for f in methods if f not in hooks]
    return config


def seconds() -> list[float]:
    """The fastest of several builds with our own extensions, and without, in turn."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for own in RUNS * [True, False]:
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(folder, own)
            start = time.perf_counter()
            config.plugins.on_startup(command="build", dirty=False)
            build(config)
            found[own].append(time.perf_counter() - start)
    return [min(times) for times in found.values()]


def packed(path: Path) -> int:
    return len(gzip.compress(path.read_bytes()))


def weigh(site: Path) -> dict[str, tuple[int, bool]]:
    """Bytes that each page makes a browser load, and whether it has a live figure."""
    # The frame of every page: its style sheets, its scripts and the search's worker.
    worker = sum(map(packed, site.glob("assets/javascripts/workers/*.js")))
    weights = {}
    for path in sorted(site.rglob("*.html")):
        html = path.read_text(encoding="utf-8")
        pattern = r'(?:href|src)="([^":]+\.(?:css|js))"'
        files = {(path.parent / name).resolve() for name in re.findall(pattern, html)}
        live = "<live-figure" in html
        if live:
            files |= {p.resolve() for p in site.glob("assets/live/*.js")}
        total = packed(path) + worker + sum(packed(p) for p in files if p.exists())
        weights[path.relative_to(site).as_posix()] = (total, live)
    return weights


def main() -> int:
    logging.disable()
    with_ours, without = seconds()
    ratio = with_ours / without
    print(f"build: {with_ours:.2f} s, {ratio:.2f} × the {without:.2f} s without ours")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder, own=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        weights = weigh(Path(folder))
        left_out = {
            what: max(map(packed, Path(folder).glob(files)))
            for what, files in LEFT_OUT.items()
        }
    heavy = []
    for page, (size, live) in weights.items():
        limit = TEXT_PAGE + LIVE * live
        heavy += [page] * (size > limit)
        print(f"{size / 1000:6.1f} of {limit // 1000} KB  {page}")
    for what, size in left_out.items():
        print(f"{size / 1000:6.1f} KB, in no limit: {what}")
    return bool(heavy) or ratio > SLOWER


if __name__ == "__main__":
    sys.exit(main())
