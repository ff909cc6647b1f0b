"""What of matplotlib's SVG is stored: what can be seen, once, in the site's colours."""

import re

import pytest

from tools import figures

from .conftest import ROOT

FOLDER = ROOT / figures.FOLDER
DRAWN = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.svg"))

RAW = """<?xml version="1.0"?>
<!DOCTYPE svg>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="90pt" height="40pt" \
viewBox="0 0 90.4 39.6" xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata><rdf:RDF xmlns:rdf="http://x"/></metadata>
 <defs><style type="text/css">*{stroke-linecap: butt}</style></defs>
 <!-- a comment -->
 <g id="figure_1">
  <g id="patch_1"><path d="M 0 40 L 90 40 z
" style="fill: none"/></g>
  <defs><path id="m1" d="M 0 0
L 0 3.5
" style="stroke: #020202; stroke-width: 0.8"/></defs>
  <g clip-path="url(#p1)">
   <use xlink:href="#m1" x="61.2666" y="9.04999"/>
   <path d="M 10.26 20.123456 L 12 30.98" style="fill: #040401; opacity: 0.155555; \
stroke-linejoin: miter"/>
  </g>
  <g id="text_1">
   <text style="font: 11px 'DejaVu Sans', sans-serif; fill: #010101" x="1.26" \
transform="rotate(-0 1.26 2)">pi is 3.14159 &lt; 4</text>
  </g>
 </g>
 <defs>
  <clipPath id="p1"><rect x="0" y="0" width="90.04" height="40"/></clipPath>
  <clipPath id="p2"><rect x="0" y="0" width="90" height="40"/></clipPath>
 </defs>
</svg>
"""
STORED = """<svg viewBox="0 0 90 40" style="max-width: 90px">
<defs>
<path id="a-b-m1" d="M 0 0 L 0 3.5" style="stroke: var(--figure-faint); \
stroke-width: 0.8" />
</defs>
<g clip-path="url(#a-b-p1)">
<use href="#a-b-m1" x="61.3" y="9.0" />
<path d="M 10.3 20.1 L 12 31.0" style="fill: var(--figure-1); opacity: 0.16" />
</g>
<text style="font-size: 11px; fill: var(--figure-ink)" x="1.3">\
pi is 3.14159 &lt; 4</text>
<defs>
<clipPath id="a-b-p1">
<rect x="0" y="0" width="90.0" height="40" />
</clipPath>
</defs>
</svg>
"""


def test_what_is_seen_stays_and_nothing_else():
    assert figures.tidy(RAW, "a-b") == STORED


def test_tidying_twice_is_tidying_once():
    assert figures.tidy(STORED, "a-b") == STORED


@pytest.mark.parametrize("path", DRAWN)
def test_a_stored_figure_refers_to_parts_of_its_own(path):
    svg = (FOLDER / path).read_text(encoding="utf-8")
    made = re.findall(r' id="([^"]*)"', svg)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
    assert {a or b for a, b in used} <= set(made)
    assert len(made) == len(set(made))
    assert not re.search(r"#0[1-4]0[1-4]|<style|font-family|xmlns", svg)
