r"""What has a spelling of its own: days, times of the day, numbers in another base, ratios, formulas of chemistry."""

from __future__ import annotations

import re

from megatron_t1.reward.answers.brackets import split_top
from megatron_t1.reward.answers.normalize import untexted
from megatron_t1.reward.answers.words import NUMBER_WORDS

_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s*(?:([ap])\.?\s*m\.?)?", re.I)
_NOON = re.compile(r"(?:12(?::00)?\s*)?(noon|midnight)", re.I)
_MONTHS = "january february march april may june july august september october november december"
_DATE = re.compile(
    r"(?:\w+day,? )?(?:(?P<month>[a-z]{3,9})\.? (?P<day>\d{1,2})|(?P<day2>\d{1,2}) (?:of )?(?P<month2>[a-z]{3,9})\.?)"
    r"(?:,? (?P<year>\d{4}))?|(?:(?P<year2>\d{4})年)?(?P<month3>\d{1,2})月(?P<day3>\d{1,2})[日号]?"
)
BASES = {"hex": "16", "hexadecimal": "16", "0x": "16", "octal": "8", "binary": "2", "0b": "2"}
MAX_FORMULA_CHARS = 200
_SPECIES = r"\d{0,2}(?:[A-Z][a-z]?\d{0,3}|[()]\d{0,3}){1,30}(?:\d?[+-](?![A-Za-z\d(]))?"
_FORMULA = re.compile(
    rf"{_SPECIES}(?:(?:\+|\\to){_SPECIES}){{0,9}}|(?:\[[A-Z][a-z]\])?(?:[1-7][spdf]\^(?:1[0-4]|[1-9])){{1,20}}"
)
_ISOTOPE = re.compile(r"(?:\^(\d{1,3})_(\d{1,3})|_(\d{1,3})\^(\d{1,3}))([A-Z][a-z]?)")
_TWO_ATOMS_OR_CHARGE = re.compile(r"[A-Z].*[A-Z]|[+-]$|\^")


def date(s: str) -> str | None:
    """The one spelling of a day of the year."""
    m = _DATE.fullmatch(re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", re.sub(r"\\text|[{}]", "", s).strip().casefold()))
    if m is None:
        return None
    name = m["month"] or m["month2"] or ""
    month = next(
        (n for n, known in enumerate(_MONTHS.split(), 1) if name and known.startswith(name)), int(m["month3"] or 0)
    )
    return f"{m['year'] or m['year2'] or ''}-{month}-{int(m['day'] or m['day2'] or m['day3'])}" if month else None


def clock(s: str) -> tuple[int, str] | None:
    """(seconds after midnight, half) of a time of the day, as `Clock` has them."""
    bare = untexted(s).strip()
    if named := _NOON.fullmatch(bare):
        return (0, "a") if named[1].casefold() == "midnight" else (43_200, "p")
    m = _CLOCK.fullmatch(bare)
    if not m or not (m[2] or m[4]) or int(m[1]) > 24 or int(m[2] or 0) > 59 or int(m[3] or 0) > 59:
        return None
    hour, half = int(m[1]), (m[4] or "").casefold()
    half = half or ("" if 0 < hour < 13 else "24")
    hour = hour % 24 if half == "24" else hour % 12 + 12 * (half == "p")
    return hour * 3600 + int(m[2] or 0) * 60 + int(m[3] or 0), half


def in_base(s: str) -> str | None:
    """The one spelling of a number in a named base."""
    if not ("_" in s or "base" in s or s.lstrip("-")[:2] in BASES):
        return None
    bare = re.sub(r"^(-?)(0[xb])(?=\w)(.*)", r"\1\3_\2", re.sub(r"\\text|[(){}\s]", "", s))
    m = re.fullmatch(r"(-?)([0-9A-Fa-f.]+)(?:_|_?(?:in)?base)(\d{1,2}|0[xb]|[a-z]{3,})", bare)
    if not m or (m[2].isalpha() and len(m[2]) < 2):
        return None
    base = BASES.get(m[3], NUMBER_WORDS.get(m[3], m[3]))
    return f"{m[1]}{m[2].upper()}_{base}" if base.isdecimal() else None


def ratio(s: str) -> list[str]:
    """Parts of a:b:c and of "a to b"; [] of everything else."""
    if not (":" in s or "to" in s):
        return []
    parts = split_top(re.sub(r"^(\d+)\s*(?:\\text\{ *to *\}|to)\s*(\d+)$", r"\1:\2", s), ":")
    return parts if len(parts) > 1 else []


def formula(s: str) -> str | None:
    r"""The one spelling of a formula of chemistry: \ce{H2O}, H_2O and \mathrm{H}_2\mathrm{O}; ions, isotopes, shells,
    reactions. It only ever makes two texts equal: nothing is refused because it looks like a formula."""
    if len(s) > MAX_FORMULA_CHARS:
        return None
    bare = re.sub(r"\\(?:text|ce|mathrm)(?![a-z])|[{}\s]", "", s).replace("->", "\\to")
    if m := _ISOTOPE.fullmatch(bare):
        return f"^{m[1] or m[4]}_{m[2] or m[3]}{m[5]}"
    bare = re.sub(r"_(?=\d)|\^(?=\d?[+-])", "", bare)
    says_more_than_letters = re.search(r"[\d+-]", bare) and _TWO_ATOMS_OR_CHARGE.search(bare)
    return bare if says_more_than_letters and _FORMULA.fullmatch(bare) else None
