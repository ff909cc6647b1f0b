"""A Python-Markdown extension: formulas become MathML when the site is built.

pymdownx.arithmatex finds them, math-core renders them. Wrong TeX raises, and the
build names the page and the formula.
"""

from markdown.treeprocessors import Treeprocessor
from math_core import LatexError, LatexToMathML

from tools.extension import extension

# \tr for a transpose as the papers set it, \R for the reals.
_RENDER = LatexToMathML(macros={"tr": r"^{\mathsf{T}}", "R": r"\mathbb{R}"})


class MathML(Treeprocessor):
    def run(self, root):
        for element in root.iter():
            if element.get("class") != "arithmatex":
                continue
            block = element.tag == "div"
            tex = element.text.strip()[2:-2].strip()  # without \( \) or \[ \]
            for code, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
                tex = tex.replace(code, sign) if block else tex
            try:
                mathml = _RENDER.convert_with_local_state(tex, displaystyle=block)
            except LatexError as error:
                raise ValueError(f"the formula {tex!r} is not TeX: {error}") from None
            element.text = self.md.htmlStash.store(mathml)
            element.set("class", "formula" if block else "math")
            if block:  # wide formulas scroll, by keyboard too
                element.set("tabindex", "0")


# After the inline patterns (20) have found the formulas.
makeExtension = extension("treeprocessors", MathML, "mathml", 1)
