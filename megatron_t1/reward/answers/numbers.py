r"""Plain numbers, read exactly from a normalised text, and how they round."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_t1.reward.answers.normalize import compact, normalize


@dataclass(frozen=True)
class Exact:
    """A plain number: its exact value and how it was written."""

    value: Fraction
    decimals: int | None = None
    """Of the last digit when it was written as a decimal, else None: 2 in 1.25, 4 in 1.25e-2, -1 in 1.25e3."""
    digits: int = 0
    """Significant digits of a decimal."""
    places: int = 0
    """Digits written after the point: 2 in 1.25e-2."""


_DECIMAL = re.compile(r"(\d*)\.(\d+)|(\d+)\.?")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)\s*(?:\\overline\s*\{(\d+)\}|\((\d+)\)|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
)
_GOES_ON = re.compile(r"(\d{0,20})\.(\d{0,20}?)(?:(\d)\3{2,59}|(\d{2,20}?)\4{1,29})\\ldots")
"""Few digits: what repeats is searched for."""
_SCIENTIFIC = re.compile(r"([^+-].*?)(?:\\times|\\cdot|x)\s*10\^(?:\{\s*([+-]?\d+)\s*\}|(\d))|([\d.]+)[eE]([+-]?\d+)")
_SPACED = re.compile(r"\d{1,3}( \d{3})+(\.\d+)?")
_FRACTION = re.compile(r"(\d+)?\s*\\frac\{\s*([+-]?\d+)\s*\}\{\s*([+-]?\d+)\s*\}|(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_POSSIBLE = re.compile(r"(?=.*\d)(?:[\d\s+\-.,/(){}^eEx]|\\(?:frac|times|cdot|overline|dot|ldots))+", re.S)
"""What all of them are made of."""
_MAX_DIGITS = 1000


def exact_number(s: str) -> Exact | None:
    """A normalised string read as integer, decimal, fraction, mixed number or scientific notation; else None."""
    s = s.strip()
    if not s or len(s) > _MAX_DIGITS or not _POSSIBLE.fullmatch(s):
        return None
    while len(s) > 2 and (s[0], s[-1]) in (("(", ")"), ("{", "}")) and not any(c in "(){}," for c in s[1:-1]):
        s = s[1:-1].strip()
    sign = -1 if s[0] == "-" else 1
    s = s[1:].lstrip() if s[0] in "+-" else s
    if _THOUSANDS.fullmatch(s):
        s = s.replace(",", "")
    if " " in s and _SPACED.fullmatch(s):
        s = s.replace(" ", "")
    if m := _DECIMAL.fullmatch(s):
        if m[3] is not None:
            return Exact(Fraction(sign * int(m[3])))
        value = Fraction(sign * int(m[1] + m[2]), 10 ** len(m[2]))
        return Exact(value, len(m[2]), len((m[1] + m[2]).lstrip("0")), len(m[2]))
    if m := _REPEATING.fullmatch(s) or _GOES_ON.fullmatch(s.replace(" ", "")):
        block = "".join(digits or "" for digits in m.groups()[2:])
        head = Fraction(int((m[1] or "0") + m[2]), 10 ** len(m[2]))
        return Exact(sign * (head + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(m[2]))))
    if m := _FRACTION.fullmatch(s):
        top, bottom = int(m[2] or m[5]), int(m[3] or m[6])
        return Exact(sign * (int(m[1] or m[4] or 0) + Fraction(top, bottom))) if bottom else None
    if m := _SCIENTIFIC.fullmatch(s):
        base = exact_number(m[1] or m[4])
        power = int(m[2] or m[3] or m[5])
        if base is None or abs(power) > 400:
            return None
        decimals = None if base.decimals is None else base.decimals - power
        return Exact(sign * base.value * Fraction(10) ** power, decimals, base.digits, base.places)
    return None


def rounds_to(exact: Fraction, decimal: Exact, min_digits: int) -> bool:
    """Whether a decimal of so many digits is `exact`, rounded; the last digits of a float need not be right."""
    if decimal.decimals is None or decimal.digits < min_digits:
        return False
    slack = Fraction(2 if decimal.digits >= 14 else 1, 2) / Fraction(10) ** decimal.decimals
    return abs(exact - decimal.value) <= slack


def numbers_equal(gold: Exact, answer: Exact, rounding: bool = True) -> bool:
    """Exact equality, or with `rounding` a rounding of enough digits.

    A decimal gold of three significant digits takes a fraction or a longer decimal that rounds to it (3.14 takes
    3.14159); a fraction as gold takes a decimal of four (600/7 as 85.71); a decimal gold takes a shorter decimal of
    three with two places (2.653 as 2.65). Integers never round.
    """
    if gold.value == answer.value or not rounding:
        return gold.value == answer.value
    if gold.decimals is None:
        return answer.decimals is not None and gold.value.denominator > 1 and rounds_to(gold.value, answer, 4)
    if answer.decimals is None:
        return answer.value.denominator > 1 and rounds_to(answer.value, gold, 3)
    longer, shorter = (answer, gold) if answer.decimals > gold.decimals else (gold, answer)
    return shorter.places >= 2 and longer.decimals != shorter.decimals and rounds_to(longer.value, shorter, 3)


def answer_key(answer: str) -> str:
    """The same for spellings of an answer that plainly are one: 0.5 and \\dfrac12, (1, 2) and (1,2)."""
    normal = normalize(answer)
    number = exact_number(normal)
    return str(number.value) if number else compact(normal)
