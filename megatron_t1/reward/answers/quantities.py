r"""Equality of two answers without structure: a number, a quantity with its unit, a number in a base, words, or an
expression. Rounding, units, percent, degrees and bases are decided here.

The rules, in the direction that pays: another known unit, another base, other words are wrong; a unit that one side
left out is not. "4%" is 0.04 and never 4; a gold "4%" also takes the bare 4. Degrees and radians are converted when
one side has a pi.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from megatron_t1.reward.answers.brackets import split_top, unwrap
from megatron_t1.reward.answers.latex import UndecidableError, parse_latex
from megatron_t1.reward.answers.normalize import Exact, compact, exact_number

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
_HARMLESS_LEAD = re.compile(
    r"^\\text\{\s*(?:only|exactly|about|approximately|total|answer|the answer is)\s*:?\s*\}", re.I
)
_BINDER = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
_SHORT_WORDS = {"yes", "no", "odd", "dne", "all", "sat", "sun", "mon", "tue", "wed", "thu", "fri"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_NUMBER_WORDS = dict(zip(_NUMBERS.split(), map(str, range(17)), strict=True))
_CLOCK = re.compile(r"\d{1,2}:\d\d.*")
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


def _rounds_to(exact: Fraction, decimal: Exact, min_digits: int) -> bool:
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
        return answer.value.denominator > 1 and _rounds_to(answer.value, gold, 3)
    if gold.decimals is None and answer.decimals is not None:
        return gold.value.denominator > 1 and _rounds_to(gold.value, answer, 4)
    if gold.decimals is not None and answer.decimals is not None:
        return 2 <= answer.decimals < gold.decimals and _rounds_to(gold.value, answer, 3)
    return False


def _split_unit(s: str) -> tuple[str, str]:
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


def _units_clash(gold: str, answer: str) -> bool:
    known = _UNIT_WORDS.keys()
    return bool(gold and answer) and gold != answer and (gold.split("^")[0] in known or answer.split("^")[0] in known)


def _in_base(s: str) -> tuple[str, str] | None:
    m = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d{1,2}|\\text\{[a-z]+\})\s*\}?", s)
    return (m[1], _NUMBER_WORDS.get(m[2][6:-1], m[2])) if m else None


def _ratio(s: str) -> str:
    """a:b and "a to b" as a fraction; clock times stay."""
    parts = split_top(re.sub(r"^(\d+)\s*(?:\\text\{ *to *\}|to)\s*(\d+)$", r"\1:\2", s), ":")
    if len(parts) == 2 and not re.fullmatch(r"\d{1,2}:\d\d", compact(s)):
        return rf"\frac{{{unwrap(parts[0])}}}{{{unwrap(parts[1])}}}"
    return s


def leaves_equal(gold: str, answer: str) -> bool:
    """Verdict on two normalised answers without lists, brackets or relations.

    Raises:
        UndecidableError: the mathematics cannot be read or is too large.
    """
    gold, answer = _HARMLESS_LEAD.sub("", gold), _HARMLESS_LEAD.sub("", answer)
    if compact(gold) == compact(answer):
        return True
    if any("\\infty" in s and not _BINDER.search(s) for s in (gold, answer)):
        return False
    g_base, a_base = _in_base(gold), _in_base(answer)
    if g_base or a_base:
        return g_base == a_base
    if is_text(gold) or is_text(answer) or _CLOCK.fullmatch(gold):
        a, b = (_NUMBER_WORDS.get(w, w) for w in (words(gold), words(answer)))
        return a == b != "" and gold.startswith("-") == answer.startswith("-")
    g_value, g_unit = _split_unit(gold)
    a_value, a_unit = _split_unit(answer)
    if "%" in (g_unit, a_unit):
        return _percents_equal(g_value, g_unit, a_value, a_unit)
    if {g_unit, a_unit} == {"deg", "rad"}:
        return _expressions_equal(*(v + r"^\circ" * (u == "deg") for v, u in ((g_value, g_unit), (a_value, a_unit))))
    if _units_clash(g_unit, a_unit):
        return False
    if "deg" in (g_unit, a_unit) and g_unit != a_unit and ("\\pi" in gold or "\\pi" in answer):
        return _expressions_equal(gold, answer)
    return _values_equal(g_value, a_value)


def _percents_equal(gold: str, gold_unit: str, answer: str, answer_unit: str) -> bool:
    if gold_unit == answer_unit:
        return _values_equal(gold, answer)
    if answer_unit == "%":
        return _values_equal(gold, rf"\frac{{{answer}}}{{100}}")
    if exact_number(answer) and _values_equal(gold, answer):
        return True
    g = exact_number(gold)
    if g is not None:
        hundredth = replace(g, value=g.value / 100, decimals=None if g.decimals is None else g.decimals + 2)
        return _value_equals_number(hundredth, answer)
    return _values_equal(rf"\frac{{{gold}}}{{100}}", answer)


def _values_equal(gold: str, answer: str) -> bool:
    gold, answer = _ratio(unwrap(gold)), _ratio(unwrap(answer))
    if compact(gold) == compact(answer):
        return True
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a)
    if _expressions_equal(gold, answer):
        return True
    if g is not None and g.decimals is not None:
        return _value_equals_number(g, answer)
    # a decimal for a closed form is a guess (3.14159 for pi) unless the closed form is itself a plain fraction
    if (
        a is not None
        and a.digits >= 4
        and re.fullmatch(r"[\d\s.{}()+\-/*]*(?:\\(?:frac|cdot|times)[\d\s.{}()+\-/*]*)*", gold)
    ):
        return _value_equals_number(a, gold)
    return False


def _value_equals_number(number: Exact, expression: str) -> bool:
    """Whether an expression has the value of a number, or rounds to it."""
    from megatron_t1.reward.answers import expressions

    plain = exact_number(expression)
    if plain is not None:
        return numbers_equal(number, plain)
    value = expressions.decimal_value(expression)
    return value is not None and abs(value) < 10**30 and _rounds_to(Fraction(str(value)), number, 3)


def _expressions_equal(gold: str, answer: str) -> bool:
    from megatron_t1.reward.answers import expressions  # heavy, and only allowed inside a worker

    if not gold or not answer or _foreign_words(gold, answer):
        return False
    return expressions.expressions_equal(gold, answer)


def _foreign_words(gold: str, answer: str) -> bool:
    r"""Words inside the answer's mathematics that the gold does not have ("\text{not }4")."""
    return any(len(w.strip()) > 1 and w not in gold for w in re.findall(r"\\text\{([^{}]*)\}", answer))


MAX_TEXT_WORDS = 4
"""Longer text answers are sentences, which have too many spellings."""


def check_readable_leaf(s: str) -> None:
    """Whether a normalised answer without structure is a number, a quantity, a short text or an expression.

    Raises:
        UndecidableError: it is none of these.
    """
    value = _ratio(_split_unit(s)[0].removesuffix("^\\circ"))
    if is_text(s) or _WORD.search(value):
        if len(words(s).split()) > MAX_TEXT_WORDS:
            raise UndecidableError(f"a sentence: {s[:60]!r}")
        return
    if re.fullmatch(r"\d{1,2}:\d\d", compact(s)):
        return
    if exact_number(value) is None and _in_base(s) is None and value.strip("+- ") not in _NAMED_VALUES:
        parse_latex(value)


_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{4,}")
_NAMED_VALUES = ("\\infty", "\\emptyset", "\\mathbb{R}", "\\mathbb{Z}", "\\mathbb{N}")
