r"""Whether two answers without structure are equal: numbers, quantities, words, clock times, expressions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

from mpmath.libmp import to_rational

from megatron_t1.reward.answers.compare_trees import decimal_value, same_value
from megatron_t1.reward.answers.evaluate import Meter
from megatron_t1.reward.answers.kinds import (
    Answer,
    Approximation,
    Clock,
    Expression,
    Literal,
    Number,
    Quantity,
    Words,
)
from megatron_t1.reward.answers.names import value_of
from megatron_t1.reward.answers.normalize import compact, untexted
from megatron_t1.reward.answers.numbers import Exact, exact_number, numbers_equal, rounds_to
from megatron_t1.reward.answers.policy import DEFAULT, EqualityConfig
from megatron_t1.reward.answers.quantities import (
    DEGREES,
    NO_UNIT,
    PERCENT,
    RADIANS,
    Unit,
    units_clash,
)
from megatron_t1.reward.answers.read import plain
from megatron_t1.reward.answers.residues import same_residues
from megatron_t1.reward.answers.tokens import UndecidableError
from megatron_t1.reward.answers.trees import rational
from megatron_t1.reward.answers.words import NUMBER_WORDS, words


def equal_cheaply(gold: str, answer: str, rounding: bool = True) -> bool | None:
    """Verdict of strings and exact numbers on normalised texts; None when only `equal` can tell."""
    if compact(gold) == compact(answer):
        return True
    if not answer:
        return False
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a, rounding)
    for comma, point in ((gold, answer), (answer, gold)):  # a decimal comma against a decimal point
        if re.fullmatch(r"-?\d+,\d+", comma) and re.fullmatch(r"-?\d+\.\d+", point):
            return comma.replace(",", ".") == point
    return None


class Leaves:
    """One verdict on what has no structure: all its parts share a budget."""

    def __init__(self, policy: EqualityConfig = DEFAULT) -> None:
        self.policy = policy
        self.meter = Meter()

    def leaves_equal(self, gold: Answer, answer: Answer) -> bool:
        match gold, answer:
            case (Literal(), _) | (_, Literal()):
                return False
            case (Words(), _) | (_, Words()):
                return same_words(gold, answer) or self.spelled_equal(gold, answer)
            case Clock(), Clock():
                halves = {gold.half, answer.half}
                if "" in halves and "24" not in halves:
                    return gold.seconds % 43_200 == answer.seconds % 43_200
                return gold.seconds == answer.seconds and "" not in halves
            case (Clock(), _) | (_, Clock()):
                return any(self.leaves_equal(*pair) for pair in _out_of_clock(gold, answer))
        (g_value, g_unit), (a_value, a_unit) = _value_and_unit(gold), _value_and_unit(answer)
        units = {g_unit, a_unit}
        if PERCENT in units:
            return self.percents_equal(gold, answer)
        if DEGREES in units and (RADIANS in units or (NO_UNIT in units and "\\pi" in gold.text + answer.text)):
            in_degrees = [gold if g_unit == DEGREES else g_value, answer if a_unit == DEGREES else a_value]
            return self.expressions_equal(*in_degrees)
        left_out = bool(g_unit.kind) and a_unit == NO_UNIT
        if units_clash(g_unit, a_unit) or (left_out and self.policy.units == "required"):
            return False
        if g_unit.kind != a_unit.kind or g_unit.factor == a_unit.factor:
            return self.values_equal(g_value, a_value)
        return self.values_equal(g_value, _scaled(a_value, a_unit.factor / g_unit.factor))

    def spelled_equal(self, gold: Answer, answer: Answer) -> bool:
        r"""Mathematics that one side has in \text{...}: its letters stand alone, or they would be words."""
        if isinstance(gold, Words) == isinstance(answer, Words):
            return False
        texts = [untexted(each.text) for each in (gold, answer)]
        in_words = texts[isinstance(answer, Words)]
        mathematics = not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2}", in_words) and re.search(r"[-+/^!|\d]", in_words)
        return bool(mathematics) and self.leaves_equal(*map(plain, texts))

    def percents_equal(self, gold: Answer, answer: Answer) -> bool:
        (gold, gold_unit), (answer, answer_unit) = _value_and_unit(gold), _value_and_unit(answer)
        if gold_unit == answer_unit:
            return self.values_equal(gold, answer)
        if NO_UNIT not in (gold_unit, answer_unit):
            return False
        if answer_unit == PERCENT:
            as_is = self.policy.percent == "either" and self.values_equal(gold, answer)
            return as_is or self.values_equal(gold, Expression(_hundredth(answer)))
        if self.policy.percent != "exact" and isinstance(answer, Number) and self.values_equal(gold, answer):
            return True
        if not isinstance(gold, Number):
            return self.values_equal(Expression(_hundredth(gold)), answer)
        decimals = None if gold.exact.decimals is None else gold.exact.decimals + 2
        return self.agrees_with(answer, replace(gold.exact, value=gold.exact.value / 100, decimals=decimals))

    def values_equal(self, gold: Answer, answer: Answer) -> bool:
        if gold.key == answer.key:
            return True
        match gold, answer:
            case Number(), Number():
                return self.numbers_equal(gold.exact, answer.exact)
        same = self.expressions_equal(gold, answer)
        if same or not self.policy.rounding:
            return same
        match gold, answer:
            case Number(exact=Exact(decimals=int()) as number), _:
                return self.agrees_with(answer, number)
            case _, Number(exact=number) if number.digits >= 4 and _PLAIN_FRACTION.fullmatch(gold.text):
                # a decimal for a closed form is a guess (3.14159 for pi) unless it is itself a plain fraction
                return self.agrees_with(gold, number)
        return False

    def agrees_with(self, answer: Answer, number: Exact) -> bool:
        """Whether an expression has the value of a number, or rounds to it."""
        if isinstance(answer, Number):
            return self.numbers_equal(number, answer.exact)
        if not self.policy.rounding:
            return same_value(rational(number.value), answer.tree, self.meter)
        value = decimal_value(answer.tree, self.meter)
        return value is not None and abs(value) < 10**30 and rounds_to(Fraction(*to_rational(value._mpf_)), number, 3)

    def is_near(self, said: Approximation) -> bool:
        r"""Whether what is called about equal is: 42 \approx 41 says two things. Also where one has no value."""
        try:
            exact, *others = (self._amounts(each) for each in (said.exact, *said.rounded))
        except UndecidableError:
            return True
        units = (_last_digit(each) for each in said.rounded)
        return all(_is_near(exact, other, unit) for other, unit in zip(others, units, strict=True))

    def _amounts(self, answer: Answer) -> tuple[Any, Any]:
        """Its value as it is written, and in basic units; None when it has none."""
        value, unit = _value_and_unit(value_of(answer))
        amount = decimal_value(value.tree, self.meter)
        factor = {PERCENT: Fraction(1, 100), DEGREES: Fraction(314159, 18 * 10**6)}.get(unit, unit.factor)
        return amount, amount and amount * factor.numerator / factor.denominator

    def numbers_equal(self, gold: Exact, answer: Exact) -> bool:
        return numbers_equal(gold, answer, self.policy.rounding)

    def expressions_equal(self, gold: Answer, answer: Answer) -> bool:
        if not gold.text or not answer.text or _foreign_words(gold.text, answer.text):
            return False
        if ("\\pmod" in gold.text) != ("\\pmod" in answer.text):
            return same_residues(gold.tree, answer.tree, self.meter)
        return same_value(gold.tree, answer.tree, self.meter)


def _last_digit(answer: Answer) -> Fraction:
    """What its last written digit counts; 0 when it is no decimal or whole number."""
    value = _value_and_unit(answer)[0]
    if not isinstance(value, Number) or (value.exact.decimals is None and value.exact.value.denominator > 1):
        return Fraction(0)
    zeros = len(re.findall(r"0*$", str(value.exact.value))[0])
    return Fraction(10) ** (zeros if value.exact.decimals is None else -value.exact.decimals)


def _is_near(exact: tuple[Any, Any], other: tuple[Any, Any], unit: Fraction) -> bool:
    """Less than one off, which is a slip, or within 5%: of the digits that are written, or in another unit."""
    if None in (*exact, *other):
        return True
    off, off_by_unit = (abs(e - o) for e, o in zip(exact, other, strict=True))
    if off < 1 or (off <= abs(exact[0]) / 20 and (off < float(unit) or not unit)):
        return True
    return (exact[0] != exact[1] or other[0] != other[1]) and off_by_unit <= abs(exact[1]) / 20


_PLAIN_FRACTION = re.compile(r"[\d\s.{}()+\-/*]*(?:\\(?:frac|cdot|times)[\d\s.{}()+\-/*]*)*")


def _scaled(value: Answer, factor: Fraction) -> Answer:
    if not isinstance(value, Number):
        return Expression(f"({value.text})\\cdot \\frac{{{factor.numerator}}}{{{factor.denominator}}}")
    exact = replace(value.exact, value=value.exact.value * factor, decimals=None)
    return Number(str(exact.value), exact)


def _out_of_clock(gold: Answer, answer: Answer) -> Iterator[tuple[Answer, Answer]]:
    """Pairs with the other reading of a clock time: 3:45 is 3 to 45, and 10 a.m. says 10."""
    for i, each in enumerate((gold, answer)):
        if isinstance(each, Clock):
            parts = re.findall(r"\d+", each.text)
            if len(parts) == 1 or (len(parts) == 2 and not each.half and int(parts[1])):
                other = plain("/".join(parts))
                yield (gold, other) if i else (other, answer)


def same_words(gold: Answer, answer: Answer) -> bool:
    """The same words; what "and", "or" or commas join may stand in any order."""
    (g_parts, g_or), (a_parts, a_or) = _joined_words(gold), _joined_words(answer)
    if len(g_parts) == 1 < len(a_parts) and not a_or and all(len(part) == 1 for part in a_parts):
        return gold.text.isupper() and g_parts == ["".join(a_parts)]  # A, C, D for ACD
    return g_parts == a_parts and (len(g_parts) == 1 or g_or == a_or) and any(g_parts)


def _joined_words(answer: Answer) -> tuple[list[str], bool]:
    parts = [words(part) for part in re.split(r"[,;]", untexted(answer.text))]
    return sorted(NUMBER_WORDS.get(part, part) for part in parts if part), "\\lor" in answer.text


def _value_and_unit(answer: Answer) -> tuple[Answer, Unit]:
    return (answer.value, answer.unit) if isinstance(answer, Quantity) else (answer, NO_UNIT)


def _hundredth(percents: Answer) -> str:
    return rf"\frac{{{percents.text}}}{{100}}"


def _foreign_words(gold: str, answer: str) -> bool:
    r"""Words inside the answer's mathematics that the gold does not have ("\text{not }4")."""
    return any(len(w.strip()) > 1 and w not in gold for w in re.findall(r"\\text\{([^{}]*)\}", answer))
