"""Formulas of a model's text as MathML, which browsers draw without a script or a font of ours; all else stays text.

The text is hostile: a formula is short, what comes out has only the elements and attributes of a list, and what can't
be read stays as it was written.
"""

from __future__ import annotations

import re
from functools import lru_cache
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markupsafe import Markup, escape

MAX_CHARS, MAX_FORMULAS = 400, 300
"""Of one formula; in one text."""
_FORMULA = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$"
    r"|\$(?P<b>(?=\S)[^$\n]+(?<=\S)|\s[^$\n]+\s)\$(?!\d)"  # as Pandoc has it: no formula lies between $5 and $3
    rf"|\\\[(?P<c>.{{1,{MAX_CHARS}}}?)\\\]|\\\((?P<d>.{{1,{MAX_CHARS}}}?)\\\)"
    r"|(?P<e>\\boxed\{[^{}\n]*\})",
    re.S,
)
_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
_ELEMENTS = {
    *("math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup"),
    *("munder", "mover", "munderover", "mmultiscripts", "mprescripts", "none", "mtable", "mtr", "mtd", "mpadded"),
    *("mphantom", "menclose", "mstyle", "merror"),
}
_ATTRIBUTES = {
    *("display", "stretchy", "fence", "form", "separator", "lspace", "rspace", "minsize", "maxsize", "accent", "width"),
    *(
        "accentunder",
        "movablelimits",
        "largeop",
        "symmetric",
        "linethickness",
        "mathvariant",
        "columnalign",
        "notation",
    ),
    *("displaystyle", "scriptlevel", "columnspacing", "rowspacing", "columnlines", "rowlines", "height", "depth"),
}


def with_formulas(text: str) -> Markup:
    """The text, escaped, with what stands in $, $$, \\( or \\[, and \\boxed, as MathML."""
    parts, at, left = [], 0, MAX_FORMULAS
    for match in _FORMULA.finditer(text):
        latex = next(group for group in match.groups() if group is not None)
        drawn = _mathml(latex, bool(match["a"] or match["c"])) if left and len(latex) <= MAX_CHARS else None
        if drawn is not None:
            parts += [escape(text[at : match.start()]), Markup(drawn)]
            at, left = match.end(), left - 1
    return Markup("").join([*parts, escape(text[at:])])


@lru_cache(maxsize=4096)
def _mathml(latex: str, block: bool) -> str | None:
    """None for what is no formula, or not a harmless one."""
    try:
        root = ElementTree.fromstring(convert(latex, display="block" if block else "inline"))
    except Exception:  # the library has no class for what it can't read
        return None
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        if element.tag not in _ELEMENTS:
            return None
        element.attrib = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES}
    root.set("title", latex)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
