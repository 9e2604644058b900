r"""Formulas of chemistry in one spelling: \ce{H2O}, H_2O and \mathrm{H}_2\mathrm{O}; ions, isotopes, shells, reactions.

The spelling only ever makes two texts equal: nothing is refused because it looks like a formula.
"""

from __future__ import annotations

import re

MAX_CHARS = 200
_SPECIES = r"\d{0,2}(?:[A-Z][a-z]?\d{0,3}|[()]\d{0,3}){1,30}(?:\d?[+-](?![A-Za-z\d(]))?"
_FORMULA = re.compile(
    rf"{_SPECIES}(?:(?:\+|\\to){_SPECIES}){{0,9}}|(?:\[[A-Z][a-z]\])?(?:[1-7][spdf]\^(?:1[0-4]|[1-9])){{1,20}}"
)
_ISOTOPE = re.compile(r"(?:\^(\d{1,3})_(\d{1,3})|_(\d{1,3})\^(\d{1,3}))([A-Z][a-z]?)")
_TWO_ATOMS_OR_CHARGE = re.compile(r"[A-Z].*[A-Z]|[+-]$|\^")


def formula(s: str) -> str | None:
    """The one spelling of a formula of chemistry; None of everything else."""
    if len(s) > MAX_CHARS:
        return None
    bare = re.sub(r"\\(?:text|ce|mathrm)(?![a-z])|[{}\s]", "", s).replace("->", "\\to")
    if m := _ISOTOPE.fullmatch(bare):
        return f"^{m[1] or m[4]}_{m[2] or m[3]}{m[5]}"
    bare = re.sub(r"_(?=\d)|\^(?=\d?[+-])", "", bare)
    says_more_than_letters = re.search(r"[\d+-]", bare) and _TWO_ATOMS_OR_CHARGE.search(bare)
    return bare if says_more_than_letters and _FORMULA.fullmatch(bare) else None
