"""What is read in answers without structure: units, bases, ratios, words; and how numbers round."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_t1.reward.answers.brackets import split_top, unwrap
from megatron_t1.reward.answers.normalize import Exact, compact

_UNIT_WORDS = {
    "h": "hour hours hr hrs h", "min": "minute minutes min mins", "s": "second seconds sec secs s",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "m": "meter meters metre metres m", "cm": "centimeter centimeters cm", "mm": "millimeter millimeters mm",
    "km": "kilometer kilometers kilometre kilometres km", "in": "inch inches in", "ft": "foot feet ft",
    "yd": "yard yards yd", "mi": "mile miles mi", "kg": "kilogram kilograms kg", "g": "gram grams g",
    "lb": "pound pounds lb lbs", "l": "liter liters litre litres l", "ml": "milliliter milliliters ml",
    "dollar": "dollar dollars usd bucks", "cent": "cent cents", "mph": "mph", "km/h": "kmh kph km/h", "m/s": "m/s",
    "rad": "radian radians rad", "deg": "degree degrees", "oz": "ounce ounces oz", "gal": "gallon gallons gal",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in words.split()}
_POWER = r"(?:\s*\^\s*\{?\s*(\d)\s*\}?)?"
_QUANTITY = (  # value, unit, power: 5 m, 10 weeks, 40 \text{ feet}^2
    re.compile(rf"([+-]?[\d.,]+)\s*((?:m|g|s|h|l|L|km|cm|mm|kg|ml|ft)(?:/[a-z]{{1,4}})?){_POWER}"),
    re.compile(rf"([+-]?[\d.,/ ]*\d|.*\}})\s*([A-Za-z][A-Za-z]+(?:[ /][A-Za-z]+)*){_POWER}", re.S),
    re.compile(rf"(.*[\d}})!\w])\s*\\text\{{([^{{}}]*)\}}{_POWER}", re.S),
)
_ORDINAL = re.compile(
    r"\s*\^\s*\{\s*(?:\\text\{)?\s*(?:th|st|nd|rd)\s*\}?\s*\}$|(?<=\d)\s*(?:\\text\{\s*)?(?:th|st|nd|rd)\b.*$"
)
NEGATION = re.compile(r"(?<![a-z])(?:not|never|no|none|neither|nor|except|cannot|isn't|non)(?![a-z])", re.I)
_SHORT_WORDS = {"yes", "no", "odd", "dne", "all", "sat", "sun", "mon", "tue", "wed", "thu", "fri"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBER_WORDS = dict(zip(_NUMBERS.split(), map(str, range(17)), strict=True))
CLOCK = re.compile(r"\d{1,2}:\d\d.*")
_STOP_WORDS = {"the", "a", "an", "is", "are", "and", "or"}


def words(s: str) -> str:
    """Plain words of a text answer, for comparison."""
    s = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", s)
    s = re.sub(r"\b([a-z])\.\s?([a-z])\.", r"\1\2", s.casefold())  # p.m., i.e.
    s = re.sub(r"[^\w\s]", " ", s)
    return " ".join(w for w in s.split() if w not in _STOP_WORDS) or s.strip()


def is_text(s: str) -> bool:
    r"""Words, not mathematics: all \text{...}, capital letters naming points, or words of four letters and more."""
    if s.casefold() in _SHORT_WORDS:
        return True
    outside = re.sub(r"\\text\{[^{}]*\}", "", s)
    if outside != s and not re.search(r"[A-Za-z0-9\\]", outside):
        return True
    return bool(re.fullmatch(r"[A-Z]{2,}|(?:[A-Za-z]{2,}[ ,.\-]+)*[A-Za-z]{4,}", s.strip("() ")))


def rounds_to(exact: Fraction, decimal: Exact, min_digits: int) -> bool:
    if decimal.decimals is None or decimal.decimals < 1 or decimal.digits < min_digits:
        return False
    return abs(exact - decimal.value) <= Fraction(1, 2 * 10**decimal.decimals)


def numbers_equal(gold: Exact, answer: Exact) -> bool:
    """Exact equality, or a rounding of enough digits.

    A decimal gold of three significant digits takes a fraction that rounds to it; a fraction as gold takes a decimal
    of four (600/7 as 85.71); a decimal gold takes a shorter decimal of three (2.653 as 2.65). Integers never round.
    """
    if gold.value == answer.value:
        return True
    if gold.decimals is not None and answer.decimals is None:
        return answer.value.denominator > 1 and rounds_to(answer.value, gold, 3)
    if gold.decimals is None and answer.decimals is not None:
        return gold.value.denominator > 1 and rounds_to(gold.value, answer, 4)
    if gold.decimals is not None and answer.decimals is not None:
        return 2 <= answer.decimals < gold.decimals and rounds_to(gold.value, answer, 3)
    return False


def split_unit(s: str) -> tuple[str, str]:
    r"""(value, canonical unit) of a quantity; '%' and 'deg' are units. Unit '' when there is none."""
    s = s.strip()
    if s.endswith("%"):
        return s[:-1].strip(), "%"
    if s.endswith("^\\circ"):
        return s[: -len("^\\circ")].strip(), "deg"
    s = re.sub(r"(?<=[\d})])\s*[\u3040-\u30ff\u4e00-\u9fff]+$", "", _ORDINAL.sub("", s))
    for pattern in _QUANTITY:
        if m := pattern.fullmatch(s):
            word, power = m[2].strip(" .").casefold(), m[3] or "1"
            if NEGATION.search(word):
                return s, ""
            if spelled := re.match(r"(square|sq\.?|cubic)\s+(\w+)", word):
                word, power = spelled[2], "3" if spelled[1] == "cubic" else "2"
            unit = _UNITS.get(word, word)
            if unit == word and "\\text" not in s and len(word) < 4 and " " not in s:
                return s, ""  # 6xy
            return m[1].strip(), unit if power == "1" or not unit else f"{unit}^{power}"
    return s, ""


def units_clash(gold: str, answer: str) -> bool:
    known = _UNIT_WORDS.keys()
    return bool(gold and answer) and gold != answer and (gold.split("^")[0] in known or answer.split("^")[0] in known)


def in_base(s: str) -> str | None:
    """The one spelling of a number in a named base."""
    m = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d{1,2}|\\text\{[a-z]+\})\s*\}?", s)
    return f"{m[1]}_{NUMBER_WORDS.get(m[2][6:-1], m[2])}" if m else None


def ratio(s: str) -> str:
    """a:b and "a to b" as a fraction; clock times stay."""
    parts = split_top(re.sub(r"^(\d+)\s*(?:\\text\{ *to *\}|to)\s*(\d+)$", r"\1:\2", s), ":")
    if len(parts) == 2 and not re.fullmatch(r"\d{1,2}:\d\d", compact(s)):
        return rf"\frac{{{unwrap(parts[0])}}}{{{unwrap(parts[1])}}}"
    return s
