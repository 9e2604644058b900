r"""Whether an answer says the same as the gold: both as typed values of read.py, compared part by part.

Strict in the direction that pays: a longer list, another bracket, another variable, a relation that does not hold, a
hedge, another known unit, another base, other words are wrong; a unit that one side left out is not. "4%" is 0.04 and
never 4; a gold "4%" also takes the bare 4. Degrees and radians are converted when one side has a pi.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from megatron_t1.reward.answers.compare_trees import (
    MIRRORED,
    decimal_value,
    is_open,
    same_relation,
    same_value,
    solves,
)
from megatron_t1.reward.answers.evaluate import Meter
from megatron_t1.reward.answers.latex import UndecidableError
from megatron_t1.reward.answers.normalize import Exact, compact, exact_number
from megatron_t1.reward.answers.quantities import NUMBER_WORDS, numbers_equal, rounds_to, units_clash, words
from megatron_t1.reward.answers.read import (
    SYMBOL,
    Answer,
    Approximation,
    Expression,
    Interval,
    List,
    Literal,
    Matrix,
    Number,
    Quantity,
    Region,
    Relation,
    Set,
    Tuple,
    Words,
)

MAX_TEXT_WORDS = 4
"""Longer text answers are sentences, which have too many spellings."""


def equal_cheaply(gold: str, answer: str) -> bool | None:
    """Verdict of strings and exact numbers on normalised texts; None when only `equal` can tell."""
    if compact(gold) == compact(answer):
        return True
    if not answer:
        return False
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a)
    for comma, point in ((gold, answer), (answer, gold)):  # a decimal comma against a decimal point
        if re.fullmatch(r"-?\d+,\d+", comma) and re.fullmatch(r"-?\d+\.\d+", point):
            return comma.replace(",", ".") == point
    return None


def equal(gold: Answer, answer: Answer) -> bool:
    """Verdict on two answers, within a budget of work.

    Raises:
        UndecidableError: the mathematics cannot be read or is too large.
    """
    return _Comparison().equal(gold, answer)


class _Comparison:
    """One verdict: all its parts share a budget."""

    def __init__(self) -> None:
        self.meter = Meter()

    def equal(self, gold: Answer, answer: Answer) -> bool:
        if gold.key == answer.key:
            return True
        if not answer.text:
            return False
        match gold, answer:
            case Number(), Number():
                return numbers_equal(gold.exact, answer.exact)
            case Number(listed=List() as items), List() | Set() | Tuple():
                return self.equal(items, answer)
            case List() | Set() | Tuple(), Number(listed=List() as items):
                return self.equal(gold, items)
            case Words(), _ if _same_words(gold, answer):
                return True
            case (List(), _) | (_, List()):
                return self.lists_equal(gold, answer)
            case (Matrix(), _) | (_, Matrix()):
                g_rows, a_rows = _rows(gold), _rows(answer)
                same_shape = [len(row) for row in g_rows] == [len(row) for row in a_rows]
                return same_shape and self.in_order(list(itertools.chain(*g_rows)), list(itertools.chain(*a_rows)))
            case Tuple(), Tuple():
                same_brackets = (gold.opening, gold.closing) == (answer.opening, answer.closing)
                return same_brackets and self.in_order(gold.items, answer.items)
            case Interval(), Interval():
                same_ends = (gold.low_closed, gold.high_closed) == (answer.low_closed, answer.high_closed)
                return same_ends and self.equal(gold.low, answer.low) and self.equal(gold.high, answer.high)
            case Set(), Set():
                return self.in_any_order(gold.items, answer.items)
            case Set(items=(only,)), _:
                return self.equal(only, answer)
            case _, Set(items=(only,)):
                return self.equal(gold, only)
        g_region, a_region = _region(gold), _region(answer)
        if g_region and a_region:
            if _names_clash(g_region.variable, a_region.variable):
                return False
            if self.in_any_order(g_region.intervals, a_region.intervals):
                return True
            bracketed = isinstance(gold, Tuple) or isinstance(answer, Tuple)
            if bracketed or len(g_region.intervals) != 1 or len(a_region.intervals) != 1:
                return False
        match gold, answer:
            case Approximation(), _:
                if self.equal(gold.exact, answer):
                    return True
                plain = not isinstance(answer, (Relation, Approximation))
                return plain and any(self.equal(rounded, answer) for rounded in gold.rounded)
            case _, Approximation():
                return self.equal(gold, answer.exact)
            case (Relation(), _) | (_, Relation()):
                return self.relations_equal(gold, answer)
            case (Tuple() | Set() | Region(), _) | (_, Tuple() | Set() | Region()):
                return False
        return self.leaves_equal(gold, answer)

    # --- parts -------------------------------------------------------------------------------------------------------

    def in_any_order(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        """Every gold item has its own partner in the answer."""
        if len(gold) != len(answer):
            return False
        left = list(answer)
        for item in gold:
            partner = next((i for i, candidate in enumerate(left) if self.surely_equal(item, candidate)), None)
            if partner is None:
                return False
            left.pop(partner)
        return True

    def surely_equal(self, gold: Answer, answer: Answer) -> bool:
        try:
            return self.equal(gold, answer)
        except UndecidableError:  # this pair is no match; another one may be
            return False

    def in_order(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        return len(gold) == len(answer) > 0 and all(map(self.equal, gold, answer))

    def lists_equal(self, gold: Answer, answer: Answer) -> bool:
        """When at least one is a list."""
        g_region, a_region = _region(gold), _region(answer)
        if g_region and a_region:
            return self.in_any_order(g_region.intervals, a_region.intervals)
        if isinstance(gold, List) and isinstance(answer, List):
            once = _once(gold.items), _once(answer.items)
            return self.in_any_order(gold.items, answer.items) or self.in_any_order(*once)
        g_items, a_items = (_members(each) for each in (gold, answer))
        match _value(gold), _value(answer):
            case (Tuple(opening="(", closing=")"), _) | (_, Tuple(opening="(", closing=")")):
                return self.in_order(g_items, a_items)
            case (Set(), _) | (_, Set()):
                return self.in_any_order(g_items, a_items)
        # "15 39/40, or 639/40": several spellings of the one gold
        return isinstance(answer, List) and all(self.equal(gold, item) for item in answer.items)

    # --- relations ---------------------------------------------------------------------------------------------------

    def relations_equal(self, gold: Answer, answer: Answer) -> bool:
        """When at least one is a relation."""
        match gold, answer:
            case Relation(value_of_x=Answer() as g_value), Relation(value_of_x=Answer() as a_value):
                return not _names_clash(gold.name, answer.name) and self.equal(g_value, a_value)
            case Relation(value=Answer() as g_value), _ if not isinstance(answer, Relation):
                return self.equal(g_value, answer)
            case _, Relation(value=Answer() as a_value) if not isinstance(gold, Relation):
                return self.equal(gold, a_value)
            case _, Relation() if not isinstance(gold, Relation):
                return self.chain_says(gold, answer)
            case Relation(operators=("=",)), Relation(value=Answer() as a_value):
                return solves((gold.sides[0].tree, gold.sides[1].tree), compact(answer.name), a_value.tree, self.meter)
            case Relation(operators=("=",)), _ if not isinstance(answer, Relation):
                return solves((gold.sides[0].tree, gold.sides[1].tree), "", answer.tree, self.meter)
            case Relation(operators=(g_operator,)), Relation(operators=(a_operator,)):
                if {g_operator, a_operator} <= {*MIRRORED, "=", "\\ne"}:
                    g_sides, a_sides = ((r.sides[0].tree, r.sides[1].tree) for r in (gold, answer))
                    return same_relation(g_sides, g_operator, a_sides, a_operator, self.meter)
        if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
            return False
        return gold.operators == answer.operators and self.in_order(gold.sides, answer.sides)

    def chain_says(self, gold: Answer, answer: Relation) -> bool:
        """An equation where a value was asked: all its sides must be that value, or leave it open."""
        if not set(answer.operators) <= {"=", "\\approx"} or not self.equal(gold, answer.sides[-1]):
            return False
        return all(self.equal(gold, side) or (gold.key != "0" and _is_open(side)) for side in answer.sides[:-1])

    # --- without structure -------------------------------------------------------------------------------------------

    def leaves_equal(self, gold: Answer, answer: Answer) -> bool:
        match gold, answer:
            case (Literal(), _) | (_, Literal()):
                return False
            case (Words(), _) | (_, Words()):
                return _same_words(gold, answer)
        (g_value, g_unit), (a_value, a_unit) = _value_and_unit(gold), _value_and_unit(answer)
        if "%" in (g_unit, a_unit):
            return self.percents_equal(g_value, g_unit, a_value, a_unit)
        if {g_unit, a_unit} == {"deg", "rad"}:
            sides = (gold if g_unit == "deg" else g_value, answer if a_unit == "deg" else a_value)
            return self.expressions_equal(*sides)
        if units_clash(g_unit, a_unit):
            return False
        if "deg" in (g_unit, a_unit) and g_unit != a_unit and "\\pi" in gold.text + answer.text:
            return self.expressions_equal(gold, answer)
        return self.values_equal(g_value, a_value)

    def percents_equal(self, gold: Answer, gold_unit: str, answer: Answer, answer_unit: str) -> bool:
        if gold_unit == answer_unit:
            return self.values_equal(gold, answer)
        if answer_unit == "%":
            return self.values_equal(gold, Expression(_hundredth(answer)))
        if isinstance(answer, Number) and self.values_equal(gold, answer):
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
                return numbers_equal(gold.exact, answer.exact)
        if self.expressions_equal(gold, answer):
            return True
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
            return numbers_equal(number, answer.exact)
        value = decimal_value(answer.tree, self.meter)
        return value is not None and abs(value) < 10**30 and rounds_to(Fraction(str(value)), number, 3)

    def expressions_equal(self, gold: Answer, answer: Answer) -> bool:
        if not gold.text or not answer.text or _foreign_words(gold.text, answer.text):
            return False
        return same_value(gold.tree, answer.tree, self.meter)


_PLAIN_FRACTION = re.compile(r"[\d\s.{}()+\-/*]*(?:\\(?:frac|cdot|times)[\d\s.{}()+\-/*]*)*")


def _once(items: Sequence[Answer]) -> list[Answer]:
    return list({item.key: item for item in items}.values())


def _same_words(gold: Answer, answer: Answer) -> bool:
    g_words, a_words = (NUMBER_WORDS.get(w, w) for w in (words(gold.text), words(answer.text)))
    return g_words == a_words != "" and gold.text.startswith("-") == answer.text.startswith("-")


def _region(answer: Answer) -> Region | None:
    match answer:
        case Region():
            return answer
        case Tuple(region=region) | List(region=region) | Relation(region=region):
            return region
    return None


def _rows(answer: Answer) -> Sequence[Sequence[Answer]]:
    """Of a matrix; a column may be written as a tuple, a matrix as a list of rows."""
    match answer:
        case Matrix():
            return answer.rows
        case Tuple(opening="[") if all(isinstance(row, Tuple) and row.opening == "[" for row in answer.items):
            return [row.items for row in answer.items if isinstance(row, Tuple)]
        case Tuple():
            return [[item] for item in answer.items]
    return []


def _value(answer: Answer) -> Answer:
    """What a name stands for, or the answer itself."""
    return answer.value if isinstance(answer, Relation) and answer.value else answer


def _members(answer: Answer) -> Sequence[Answer]:
    match _value(answer):
        case List(items=items) | Set(items=items) | Tuple(items=items):
            return items
    return [answer]


def _names_clash(gold: str, answer: str) -> bool:
    """Two plain variables with different names; functions may name themselves and their argument as they like."""
    g, a = compact(gold), compact(answer)
    return g != a and all(re.fullmatch(SYMBOL, name) for name in (g, a))


def _is_open(side: Answer) -> bool:
    try:
        return is_open(side.tree)
    except UndecidableError:
        return False


def _value_and_unit(answer: Answer) -> tuple[Answer, str]:
    return (answer.value, answer.unit) if isinstance(answer, Quantity) else (answer, "")


def _hundredth(percents: Answer) -> str:
    return rf"\frac{{{percents.text}}}{{100}}"


def _foreign_words(gold: str, answer: str) -> bool:
    r"""Words inside the answer's mathematics that the gold does not have ("\text{not }4")."""
    return any(len(w.strip()) > 1 and w not in gold for w in re.findall(r"\\text\{([^{}]*)\}", answer))


def check_readable(answer: Answer) -> None:
    """Whether `equal` can compare this answer with other spellings of it, and not as a string alone.

    Raises:
        UndecidableError: some part of it is no number, short text or expression; the message names the part.
    """
    parts: Sequence[Answer] = ()
    match answer:
        case Matrix():
            parts = list(itertools.chain(*answer.rows))
        case Tuple() | Set() | List():
            parts = answer.items
        case Region():
            parts = [bound for interval in answer.intervals for bound in (interval.low, interval.high)]
        case Relation():
            parts = answer.sides
        case Approximation():
            parts = (answer.exact, *answer.rounded)
        case Literal() if answer.problem:
            raise UndecidableError(f"{answer.text[:60]!r} is {answer.problem}")
        case Words() | Literal() | Expression() if isinstance(answer, Words) or _WORD.search(answer.text):
            if len(words(answer.text).split()) > MAX_TEXT_WORDS:
                raise UndecidableError(f"a sentence: {answer.text[:60]!r}")
        case Quantity():
            parts = (answer.value,)
        case Expression() if answer.text.strip("+- ") not in _NAMED_VALUES:
            _ = answer.tree
    for part in parts:
        check_readable(part)


_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{4,}")
_NAMED_VALUES = ("\\emptyset", "\\mathbb{R}", "\\mathbb{Z}", "\\mathbb{N}")
