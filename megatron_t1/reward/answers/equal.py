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

from megatron_t1.reward.answers.compare_trees import are_one_family, decimal_value, is_open, same_relation, solves
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
from megatron_t1.reward.answers.names import (
    all_names,
    joints_clash,
    labels,
    members_in_order,
    names,
    names_clash,
    unlabelled,
    value_of,
)
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.policy import DEFAULT, EqualityConfig
from megatron_t1.reward.answers.read import plain
from megatron_t1.reward.answers.relations import MIRRORED
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
            case (Matrix(rows=rows), Expression() as total) | (Expression() as total, Matrix(rows=rows)):
                column = [row[0] for row in rows if len(row) == 1]
                is_vector = len(column) == len(rows) and _is_vector(total, len(column))
                return is_vector and self.expressions_equal(_vector(column), total)
            case List(whole=Answer() as whole), _ if self.surely_equal(whole, answer):
                return True
            case _, List(whole=Answer() as whole) if self.surely_equal(gold, whole):
                return True
            case Ratio(), Ratio() if len(gold.parts) == len(answer.parts):
                return self.proportional(gold.parts, answer.parts)
            case (Ratio(parts=(top, bottom)), _) if not isinstance(answer, Ratio):
                return self.equal(_quotient(top, bottom), answer)
            case (_, Ratio(parts=(top, bottom))) if not isinstance(gold, Ratio):
                return self.equal(gold, _quotient(top, bottom))
            case Words(), _ if same_words(gold, answer):
                return True
            case (List(), _) | (_, List()):
                return self.lists_equal(gold, answer)
            case (Matrix(), _) | (_, Matrix()) if not isinstance(gold, Relation) and not isinstance(answer, Relation):
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
            case Approximation(), Approximation() if self.is_open(gold.exact):
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

    def proportional(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        """Each crossed with the first that is not 0 in the gold: it may be 0 in the answer neither, or all would be."""
        bases = next((p for p in zip(gold, answer, strict=True) if not self.expressions_equal(p[0], _ZERO)), None)
        if bases is None or self.expressions_equal(bases[1], _ZERO):
            return False
        crossed = ((_product(g, bases[1]), _product(a, bases[0])) for g, a in zip(gold, answer, strict=True))
        return all(itertools.starmap(self.expressions_equal, crossed))

    def in_order(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        return len(gold) == len(answer) > 0 and all(map(self.equal, gold, answer))

    def lists_equal(self, gold: Answer, answer: Answer) -> bool:
        """When at least one is a list."""
        match gold, answer:
            case (List(whole=Number()), Tuple()) | (Tuple(), List(whole=Number())):
                return False  # 1,200 and (1,200)
            case (List(items=items), Tuple(opening="(")) | (Tuple(opening="("), List(items=items)) if _one_name(items):
                return False  # x = 2 or x = 3, and (2,3)
        g_region, a_region = _region(gold), _region(answer)
        if g_region and a_region:
            return self.in_any_order(self.merged(g_region), self.merged(a_region))
        if joints_clash(gold, answer):
            return False
        if isinstance(gold, List) and isinstance(answer, List):
            return self.labelled_equal(gold.items, answer.items)
        g_items, a_items = members_in_order(gold, answer)
        match value_of(gold), value_of(answer):
            case (value, other) if _is_ordered(value) or _is_ordered(other):
                return self.in_order(g_items, a_items)
            case (Set(), _) | (_, Set()) if not (isinstance(gold, List) and labels(gold.items)):
                return self.in_any_order(g_items, a_items)
            case (_, Set()):
                return self.in_order(g_items, a_items)
        # "15 39/40, or 639/40": several spellings of the one gold
        items = answer.items if isinstance(answer, List) else ()
        tells = isinstance(gold, Relation) or (isinstance(gold, Quantity) and gold.unit.kind)  # 90 degrees, or pi/2 rad
        named = labels(items) and not tells  # x = 5, y = 5
        return bool(items) and not named and all(self.equal(gold, item) for item in items)

    def labelled_equal(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        """Items in any order, each with its own name or noun; where only the gold names them, in its order."""
        g_labels, a_labels = labels(gold), labels(answer)
        g_names, a_names = names(gold), names(answer)
        if len(a_names) == 1 and {name.split("_")[0] for name in g_names} == a_names:  # x_1 = 1, x_2 = 3 as x = 1, 3
            gold, answer = [[unlabelled(item) for item in items] for items in (gold, answer)]
        g_named, a_named = ([x for x in xs if isinstance(x, Relation) and x.value] for xs in (gold, answer))
        if len(g_names) == 1 and any(names_clash(g_named[0], item) for item in a_named):  # x = 1, 2
            return False
        if len(gold) == len(_once(gold)):
            answer = _once(answer)
        if len(gold) != len(answer):
            return False
        unnamed = all(isinstance(item, Relation) and not item.value for item in gold)  # f(1) = 2, f(2) = 3
        if (g_labels or unnamed) and not (a_labels or any(isinstance(item, Relation) for item in answer)):
            return self.in_order([unlabelled(item) for item in gold], [unlabelled(item) for item in answer])
        if g_labels and a_labels:
            by_label = dict(zip(a_labels, answer, strict=True))
            others = iter([item for label, item in by_label.items() if label not in g_labels])
            return self.in_order(gold, [by_label[label] if label in by_label else next(others) for label in g_labels])
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
        for point, relation in ((value_of(gold), answer), (value_of(answer), gold)):
            if isinstance(point, Tuple) and isinstance(relation, Relation) and relation.value:
                num_names = len(all_names(relation))
                if num_names > 1:  # x = y = 5
                    return self.in_order(point.items, [relation.value] * num_names)
        match gold, answer:
            case Relation(value=Answer() as g_value), Relation(value=Answer() as a_value):
                if "(" in gold.name and "(" in answer.name:  # f(t) and f(x)
                    g_value, a_value = gold.value_of_x or g_value, answer.value_of_x or a_value
                if names_clash(gold, answer):
                    return False
                if self.equal(g_value, a_value):
                    return True
                functions = _FUNCTION.fullmatch(compact(gold.name)) and {type(g_value), type(a_value)} == {Expression}
                return bool(functions) and are_one_family(g_value.tree, a_value.tree, self.meter)
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
                return _says_solution(answer, g_value) and self.solves(answer, gold.name, g_value)
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
        return all(self.equal(gold, side) or (gold.key != "0" and self.is_open(side)) for side in answer.sides[:-1])

    def is_open(self, side: Answer) -> bool:
        try:
            return is_open(side.tree, self.meter)
        except UndecidableError:
            return False


_ZERO = plain("0")
_FUNCTION = re.compile(r"[yu]|[fgxyu]\([txyz]\)")
"""Names of what solves an equation for functions."""
_OPEN = {"\\le": "<", "\\ge": ">"}


def _once(items: Sequence[Answer]) -> list[Answer]:
    return list({item.key: item for item in items}.values())


def _product(left: Answer, right: Answer) -> Expression:
    return Expression(f"({left.text})\\cdot ({right.text})")


def _quotient(top: Answer, bottom: Answer) -> Answer:
    return plain(f"\\frac{{{top.text}}}{{{bottom.text}}}")


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


def _says_solution(equation: Relation, solution: Answer) -> bool:
    """Whether an equation is as good as its solution: that of a line, or x - 5 = 0. 2x = 10 is still to be solved."""
    if solution.tree.free_symbols:
        return True
    left, right = (side.tree for side in equation.sides)
    terms = left.args if right == 0 and left.is_Add else right.args if left == 0 and right.is_Add else ()
    alone = (term.args[1] if term.is_Mul and term.args[0] == -1 and len(term.args) == 2 else term for term in terms)
    return len(terms) == 2 and any(term.is_Symbol for term in alone)


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


def _one_name(items: Sequence[Answer]) -> bool:
    return len(names(items)) == 1 < len(items) and all(isinstance(item, Relation) for item in items)


def _is_ordered(answer: Answer) -> bool:
    """Whether it gives its parts in order; [1, 2] may be a list in brackets."""
    match answer:
        case Matrix() | Tuple(opening="(", closing=")") | Tuple(opening="[", items=(_, _, _, *_)):
            return True
    return False
