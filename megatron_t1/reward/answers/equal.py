r"""Whether an answer says the same as the gold: both as typed values of read.py, compared part by part.

Strict in the direction that pays: a longer list, another bracket, another variable, a relation that does not hold, a
hedge, another known unit, another base, other words are wrong; a unit that one side left out is not. "4%" is 0.04 and
never 4; a gold "4%" also takes the bare 4. Degrees and radians are converted when one side has a pi.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_t1.reward.answers.compare_trees import decimal_value, is_open, same_relation, solves
from megatron_t1.reward.answers.kinds import (
    Answer,
    Approximation,
    Expression,
    Interval,
    List,
    Matrix,
    Number,
    Quantity,
    Ratio,
    Region,
    Relation,
    Set,
    Tuple,
    Words,
)
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.policy import DEFAULT, EqualityConfig
from megatron_t1.reward.answers.quantities import Unit
from megatron_t1.reward.answers.read import plain
from megatron_t1.reward.answers.relations import MIRRORED, SYMBOL
from megatron_t1.reward.answers.tokens import UndecidableError
from megatron_t1.reward.answers.values import Leaves, same_words


def equal(gold: Answer, answer: Answer, policy: EqualityConfig = DEFAULT) -> bool:
    """Verdict on two answers, within a budget of work.

    Raises:
        UndecidableError: the mathematics cannot be read or is too large.
    """
    return Comparison(policy).equal(gold, answer)


class Comparison(Leaves):
    """One verdict: structures part by part."""

    def equal(self, gold: Answer, answer: Answer) -> bool:
        if gold.key == answer.key:
            return True
        if not answer.text:
            return False
        match gold, answer:
            case Number(), Number():
                return self.numbers_equal(gold.exact, answer.exact)
            case List(whole=Answer() as whole), _ if self.surely_equal(whole, answer):
                return True
            case _, List(whole=Answer() as whole) if self.surely_equal(gold, whole):
                return True
            case Ratio(), Ratio() if len(gold.parts) == len(answer.parts):
                crossed = (
                    (_product(g, answer.parts[0]), _product(a, gold.parts[0]))
                    for g, a in zip(gold.parts, answer.parts, strict=True)
                )
                return all(itertools.starmap(self.expressions_equal, crossed))
            case (Ratio(parts=(top, bottom)), _) if not isinstance(answer, Ratio):
                return self.equal(_quotient(top, bottom), answer)
            case (_, Ratio(parts=(top, bottom))) if not isinstance(gold, Ratio):
                return self.equal(gold, _quotient(top, bottom))
            case Words(), _ if same_words(gold, answer):
                return True
            case (List(), _) | (_, List()):
                return self.lists_equal(gold, answer)
            case (Matrix(), _) | (_, Matrix()) if not _is_relation(gold, answer):
                g_rows, a_rows = _rows(gold), _rows(answer)
                same_shape = [len(row) for row in g_rows] == [len(row) for row in a_rows]
                return same_shape and self.in_order(list(itertools.chain(*g_rows)), list(itertools.chain(*a_rows)))
            case Tuple(), Tuple():
                same_brackets = (gold.opening, gold.closing) == (answer.opening, answer.closing)
                two_ends = not self.policy.strict_ends and len(gold.items) == 2
                return (same_brackets or two_ends) and self.in_order(gold.items, answer.items)
            case Interval(), Interval():
                same_ends = (gold.low_closed, gold.high_closed) == (answer.low_closed, answer.high_closed)
                same_ends |= not self.policy.strict_ends
                return same_ends and self.equal(gold.low, answer.low) and self.equal(gold.high, answer.high)
            case Set(), Set():
                return self.in_any_order(_once(gold.items), _once(answer.items))
            case Set(items=(only,)), _:
                return self.equal(only, answer)
            case _, Set(items=(only,)):
                return self.equal(gold, only)
        g_region, a_region = _region(gold), _region(answer)
        if g_region and a_region:
            if g_region.variable and a_region.variable and compact(g_region.variable) != compact(a_region.variable):
                return False
            if self.in_any_order(self.merged(g_region), self.merged(a_region)):
                return True
            bracketed = isinstance(gold, Tuple) or isinstance(answer, Tuple)
            if bracketed or len(g_region.intervals) != 1 or len(a_region.intervals) != 1:
                return False
        match gold, answer:
            case Approximation(), Approximation() if _is_open(gold.exact):
                return self.equal(gold.exact, answer.exact) and self.in_order(gold.rounded, answer.rounded)
            case Approximation(), _:
                if self.equal(gold.exact, answer):
                    return True
                plain = not isinstance(answer, (Relation, Approximation))
                return plain and any(self.equal(rounded, answer) for rounded in gold.rounded)
            case _, Approximation():
                return self.equal(gold, answer.exact) and self.is_near(answer)
            case (Relation(), _) | (_, Relation()):
                return self.relations_equal(gold, answer)
            case (Tuple(items=items), Expression() as total) | (Expression() as total, Tuple(items=items)):
                return _is_vector(total, len(items)) and self.expressions_equal(_vector(items), total)
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
        match gold, answer:
            case (List(whole=Number()), Tuple()) | (Tuple(), List(whole=Number())):
                return False  # 1,200 and (1,200)
        g_region, a_region = _region(gold), _region(answer)
        if g_region and a_region:
            return self.in_any_order(self.merged(g_region), self.merged(a_region))
        if isinstance(gold, List) and isinstance(answer, List):
            return self.labelled_equal(gold.items, answer.items)
        g_items, a_items = (_members(each) for each in (gold, answer))
        match _value(gold), _value(answer):
            case (Tuple(opening="[", items=(_, _, _, *_)), _) | (_, Tuple(opening="[", items=(_, _, _, *_))):
                return self.in_order(g_items, a_items)
            case (Matrix(), _) | (_, Matrix()):
                return self.in_order(g_items, a_items)
            case (Tuple(opening="(", closing=")"), _) | (_, Tuple(opening="(", closing=")")):
                return self.in_order(g_items, a_items)
            case (Set(), _) | (_, Set()):
                return self.in_any_order(g_items, a_items)
        # "15 39/40, or 639/40": several spellings of the one gold
        return isinstance(answer, List) and all(self.equal(gold, item) for item in answer.items)

    def labelled_equal(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        """Items in any order, each with its own name or noun; where only the gold names them, in its order."""
        g_labels, a_labels = _labels(gold), _labels(answer)
        g_names, a_names = _names(gold), _names(answer)
        if len(a_names) == 1 and {name.split("_")[0] for name in g_names} == a_names:  # x_1 = 1, x_2 = 3 as x = 1, 3
            gold, answer = [[_unlabelled(item) for item in items] for items in (gold, answer)]
        if len(gold) == len(_once(gold)):
            answer = _once(answer)
        if len(gold) != len(answer):
            return False
        if g_labels and not a_labels:
            return self.in_order([_unlabelled(item) for item in gold], [_unlabelled(item) for item in answer])
        if g_labels and a_labels:
            if sorted(g_labels) != sorted(a_labels):
                return self.in_order(gold, answer)
            by_label = dict(zip(a_labels, answer, strict=True))
            return all(self.equal(item, by_label[label]) for label, item in zip(g_labels, gold, strict=True))
        return self.in_any_order(gold, answer)

    def merged(self, region: Region) -> Sequence[Answer]:
        """Its intervals from left to right, what touches or overlaps as one; as they are when an end is no number."""
        if len(region.intervals) < 2:
            return region.intervals
        ends = [(self.end(interval.low), self.end(interval.high)) for interval in region.intervals]
        if any(end is None for pair in ends for end in pair):
            return region.intervals
        rising = sorted(zip(ends, region.intervals, strict=True), key=lambda pair: (pair[0][0], not pair[1].low_closed))
        (_, high), last = rising[0]
        joined = [last]
        for (low, top), interval in rising[1:]:
            if low > high or (low == high and not (interval.low_closed or last.high_closed)):
                joined.append(interval)
                high = top
            elif top > high or (top == high and interval.high_closed):
                text = f"{joined[-1].text} to {interval.text}"
                joined[-1] = replace(joined[-1], text=text, high=interval.high, high_closed=interval.high_closed)
                high = top
            last = joined[-1]
        return joined

    def end(self, bound: Answer) -> Any:
        """Value of an end of an interval; None when it has none."""
        if "\\infty" in bound.key:
            return {"\\infty": math.inf, "-\\infty": -math.inf}.get(bound.key)
        try:
            return decimal_value(bound.tree, self.meter)
        except UndecidableError:
            return None

    # --- relations ---------------------------------------------------------------------------------------------------

    def relations_equal(self, gold: Answer, answer: Answer) -> bool:
        """When at least one is a relation."""
        match gold, answer:
            case Relation(value=Answer() as g_value), Relation(value=Answer() as a_value):
                if "(" in gold.name and "(" in answer.name:  # f(t) and f(x)
                    g_value, a_value = gold.value_of_x or g_value, answer.value_of_x or a_value
                return not _names_clash(gold, answer) and self.equal(g_value, a_value)
            case Relation(value=Answer() as g_value), _ if not isinstance(answer, Relation):
                return self.equal(g_value, answer)
            case Relation(sides=(*_, g_value)), _ if not isinstance(answer, Relation) and _is_computed(gold):
                return self.equal(g_value, answer)
            case _, Relation(value=Answer() as a_value) if not isinstance(gold, Relation):
                return self.equal(gold, a_value)
            case _, Relation() if not isinstance(gold, Relation):
                return self.chain_says(gold, answer)
            case Relation(operators=("=",)), Relation(value=Answer() as a_value):
                return self.solves(gold, answer.name, a_value)
            case Relation(value=Answer() as g_value), Relation(operators=("=",)):
                return self.solves(answer, gold.name, g_value)
            case Relation(operators=("=",)), _ if not isinstance(answer, Relation):
                return self.solves(gold, "", answer)
            case Relation(operators=(_,)), Relation(operators=(_,)):
                g_operator, a_operator = self.operators(gold)[0], self.operators(answer)[0]
                if {g_operator, a_operator} <= {*MIRRORED, "=", "\\ne"}:
                    g_sides, a_sides = ((r.sides[0].tree, r.sides[1].tree) for r in (gold, answer))
                    return same_relation(g_sides, g_operator, a_sides, a_operator, self.meter)
        if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
            return False
        return self.operators(gold) == self.operators(answer) and self.in_order(gold.sides, answer.sides)

    def solves(self, equation: Relation, name: str, solution: Answer) -> bool:
        left, right = equation.sides
        return solves((left.tree, right.tree), compact(name), solution.tree, self.meter)

    def operators(self, relation: Relation) -> Sequence[str]:
        """Its operators; as if no end were closed where that makes no difference."""
        return [o if self.policy.strict_ends else _OPEN.get(o, o) for o in relation.operators]

    def chain_says(self, gold: Answer, answer: Relation) -> bool:
        """An equation where a value was asked: all its sides must be that value, or leave it open."""
        if not set(answer.operators) <= {"=", "\\approx"} or not self.equal(gold, answer.sides[-1]):
            return False
        return all(self.equal(gold, side) or (gold.key != "0" and _is_open(side)) for side in answer.sides[:-1])


_OPEN = {"\\le": "<", "\\ge": ">"}


def _once(items: Sequence[Answer]) -> list[Answer]:
    return list({item.key: item for item in items}.values())


def _product(left: Answer, right: Answer) -> Expression:
    return Expression(f"({left.text})\\cdot ({right.text})")


def _quotient(top: Answer, bottom: Answer) -> Answer:
    return plain(f"\\frac{{{top.text}}}{{{bottom.text}}}")


def _labels(items: Sequence[Answer]) -> list[str]:
    """Names or nouns of items, when each has another one; x_1 and x_2 are one name for two values."""
    labels = []
    for item in items:
        match item:
            case Relation(name=name, value=Answer()):
                label = re.sub(r"\\(?:text|(?=m[ai][xn]))|[{}]", "", compact(name)).split("_")[0]
                labels.append(label.casefold().removesuffix("imum") if len(label) > 2 else label)
            case Quantity(unit=Unit(kind=(), noun=noun)):
                labels.append(noun)
    return labels if len(set(labels)) == len(items) > 1 else []


def _names(items: Sequence[Answer]) -> set[str]:
    return {compact(item.name) for item in items if isinstance(item, Relation) and item.value}


def _unlabelled(item: Answer) -> Answer:
    return item.value if isinstance(item, (Relation, Quantity)) and item.value else item


_AROUND_POINTS = re.compile(r"\\(?:frac|angle|triangle|cdot|text|overline|sin|cos|tan|times)|[{}\s/|:\[\]]")


def _is_computed(gold: Relation) -> bool:
    r"""log_8 4 = 2/3 or \frac{AB}{CD} = 2: an equation that gives a value, and no condition on variables."""
    if set(gold.operators) != {"="}:
        return False
    if re.fullmatch(r"[A-Z]+(?:\([A-Z]+\))?", _AROUND_POINTS.sub("", gold.sides[0].text)):
        return True
    try:
        return not any(side.tree.free_symbols for side in gold.sides)
    except UndecidableError:
        return False


_UNIT_VECTORS = "ijk"


def _is_vector(total: Expression, num_items: int) -> bool:
    """2i - 3j"""
    names = {symbol.name for symbol in total.tree.free_symbols}
    return "j" in names and names <= set(_UNIT_VECTORS[:num_items])


def _vector(items: Sequence[Answer]) -> Expression:
    return Expression("+".join(f"({x.text})\\cdot {e}" for x, e in zip(items, _UNIT_VECTORS, strict=False)))


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


def _is_relation(*answers: Answer) -> bool:
    return any(isinstance(answer, Relation) for answer in answers)


def _value(answer: Answer) -> Answer:
    """What a name stands for, or the answer itself."""
    return answer.value if isinstance(answer, Relation) and answer.value else answer


def _members(answer: Answer) -> Sequence[Answer]:
    match _value(answer):
        case List(items=items) | Set(items=items) | Tuple(items=items):
            return items
        case Matrix(rows=rows) if all(len(row) == 1 for row in rows):
            return [row[0] for row in rows]
    return [answer]


def _names_clash(gold: Relation, answer: Relation) -> bool:
    """Two plain variables with different names. Functions may name themselves and their argument as they like, but not
    an argument that their value leaves open, as in P(A) = p."""
    g, a = compact(gold.name), compact(answer.name)
    if g == a or all(re.fullmatch(SYMBOL, name) for name in (g, a)):
        return g != a and not (g == a.split("_")[0] and a.rstrip("}")[-1].isdecimal())  # x for x_1
    if g[0] == a[0] and ("^{-1}" in g) != ("^{-1}" in a):  # f and its inverse
        return True
    arguments = [name.partition("(")[2].rstrip(")") for name in (g, a)]
    is_open = arguments[0] != arguments[1] and all(arguments) and gold.value == gold.value_of_x
    return is_open and not all(argument in "nstuxyz" for argument in arguments)


def _is_open(side: Answer) -> bool:
    try:
        return is_open(side.tree)
    except UndecidableError:
        return False
