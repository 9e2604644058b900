r"""Whether two trees of latex.py have the same value, or two relations of them say the same.

Two expressions are equal when they agree at 50 digits and
again at 400 or more (so 2^1000 and 2^1000 + 1 differ, and sin(pi) is 0 but pi/10^25 is not), at several random points
when they have variables. Unknown functions f(x) get pseudo-random values, so f(x) + 1 equals 1 + f(x) and nothing else.

Left out: the values of infinite sums, integrals and limits (they only equal themselves), and everything that needs a
solver.
"""

from __future__ import annotations

import random
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef

from megatron_t1.reward.answers.evaluate import Meter, Values, evaluate, magnitude
from megatron_t1.reward.answers.latex import UndecidableError
from megatron_t1.reward.answers.trees import Binder

LOW_DIGITS, HIGH_DIGITS, MOST_DIGITS = 50, 400, 5000
NUM_POINTS = 4
_INTEGER_NAMES = {"k", "n", "m", "l"}
MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
"""Operators between exchanged sides."""
Sides = tuple[Any, Any]
"""Trees left and right of an operator."""


def _counts(node: Any) -> bool:
    """Whether a node makes sense for whole numbers only: n!, binomials, sums up to n."""
    if isinstance(node, Binder):
        return node.args[0].name in ("sum", "prod") and any(b.free_symbols for b in node.args[3:])
    return isinstance(node, (sympy.factorial, sympy.binomial)) and bool(node.free_symbols)


def is_open(tree: Any) -> bool:
    """Whether an expression says no value by itself: two variables or more, a function of its own, a limit."""
    functions = {type(node).__name__ for node in tree.atoms(AppliedUndef)} - {"bmod"}
    return len(tree.free_symbols) > 1 or bool(functions) or tree.has(Binder)


def _points(trees: list[Any], has_imaginary_unit: bool) -> list[Values]:
    """Values of the variables to try: positive and negative, rational, reproducible; never a mathematical constant."""
    names = sorted({s.name for tree in trees for s in tree.free_symbols})
    if names and any(_counts(node) for tree in trees for node in sympy.preorder_traversal(tree)):
        return [
            {name: mpmath.mpf(start + step * i) for i, name in enumerate(names)}
            for start, step in ((3, 4), (2, 7), (5, 3), (4, 9))
        ]
    generator = random.Random(20250121)
    tried = []
    for _ in range(NUM_POINTS if names else 1):
        values: Values = {}
        for name in names:
            sign = generator.choice((-1, 1))
            values[name] = sign * mpmath.mpf(generator.randrange(1_000, 60_000)) / 9973
        if has_imaginary_unit and "i" in values:
            values["i"] = mpmath.mpc(0, 1)
        tried.append(values)
    return tried


def _close(a: Any, b: Any) -> bool:
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        raise UndecidableError("not finite")
    return bool(abs(a - b) <= mpmath.mpf(10) ** (-int(mpmath.mp.dps * 0.8)) * max(abs(a), abs(b)))


def _vanishes(low: Any, high: Any) -> bool:
    """Zero but for rounding: what was left at few digits shrinks with the digits; a tiny number stays."""
    return bool(high == 0 or (abs(low) < 1e-35 and abs(high) < abs(low) * mpmath.mpf(10) ** (-HIGH_DIGITS // 2)))


def _uses_i_as_unit(trees: list[Any]) -> bool:
    names = {s.name for tree in trees for s in tree.free_symbols}
    return "i" in names and not ({"j", "k", "n", "m"} & names)


def same_value(a: Any, b: Any, meter: Meter) -> bool:
    """Whether two trees have the same value, for all values of their variables.

    Raises:
        UndecidableError: one of them cannot be evaluated within bounds.
    """
    only_a, only_b = a.free_symbols - b.free_symbols, b.free_symbols - a.free_symbols
    if len(only_a) == len(only_b) == 1 and sympy.pi in a.atoms():
        (mine,), (yours,) = only_a, only_b
        if {mine.name, yours.name} <= _INTEGER_NAMES:  # k pi and n pi are the same family
            b = b.xreplace({yours: mine})
    trees = [a, b]
    if a == b:
        return True
    decided = 0
    for values in _points(trees, _uses_i_as_unit(trees)):
        try:
            with mpmath.workdps(LOW_DIGITS):
                low = evaluate(a, values, meter), evaluate(b, values, meter)
                both_tiny = abs(low[0]) < 1e-35 and abs(low[1]) < 1e-35
                if not both_tiny and not _close(*low):
                    return False
                needed = int(max(magnitude(low[0]), 0) * 1.3) + 50
            if needed > MOST_DIGITS:
                raise UndecidableError("too large to tell from its neighbours")
            with mpmath.workdps(max(HIGH_DIGITS, needed)):
                high = evaluate(a, values, meter), evaluate(b, values, meter)
                zeros = [_vanishes(x, y) for x, y in zip(low, high, strict=True)]
                if any(zeros) != all(zeros) or (not any(zeros) and not _close(*high)):
                    return False
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
        decided += 1
        if decided == 2:  # two points at full precision; agreement at more would be no news
            return True
    if not decided:
        raise UndecidableError("undefined at every point tried")
    return True


def decimal_value(tree: Any, meter: Meter) -> Any:
    """Real value of a constant expression as an mpf of `LOW_DIGITS` digits; None when it has variables or is complex.

    Raises:
        UndecidableError: see `same_value`.
    """
    if tree.free_symbols:
        return None
    with mpmath.workdps(LOW_DIGITS):
        value = evaluate(tree, {}, meter)
        return value if not isinstance(value, mpmath.mpc) else (value.real if abs(value.imag) < 1e-30 else None)


def same_relation(gold: Sides, gold_operator: str, answer: Sides, answer_operator: str, meter: Meter) -> bool:
    """Whether `L op R` and `L' op' R'` say the same: L - R is a constant multiple of L' - R', of the right sign.

    Raises:
        UndecidableError: see `same_value`.
    """
    trees = [*gold, *answer]
    if gold[0].free_symbols | gold[1].free_symbols != answer[0].free_symbols | answer[1].free_symbols:
        return False
    ratios = []
    with mpmath.workdps(LOW_DIGITS):
        for values in _points(trees, _uses_i_as_unit(trees)):
            values_of_sides = [evaluate(tree, values, meter) for tree in trees]
            g, a = values_of_sides[0] - values_of_sides[1], values_of_sides[2] - values_of_sides[3]
            if abs(g) < 1e-30 or abs(a) < 1e-30:
                return False
            ratios.append(a / g)
        if len(ratios) < 2 or not all(_close(r, ratios[0]) for r in ratios[1:]):
            return False
        positive = mpmath.re(ratios[0]) > 0
    return answer_operator == (gold_operator if positive else MIRRORED.get(gold_operator, gold_operator))


def solves(sides: Sides, name: str, solution: Any, meter: Meter) -> bool:
    """Whether `name = solution` is the one solution of an equation, in which `name` is linear.

    Without a name, the one variable of the equation that the solution does not have is meant: 6/x solves x y = 6.

    Raises:
        UndecidableError: see `same_value`.
    """
    names = {s.name for s in sides[0].free_symbols | sides[1].free_symbols}
    unknown = {name} if name else names - {s.name for s in solution.free_symbols}
    if len(unknown) != 1 or not unknown <= names:
        return False
    variable = unknown.pop()
    with mpmath.workdps(LOW_DIGITS):
        for values in _points([*sides, solution], False):

            def residual(x: Any, values: Values = values) -> Any:
                at = {**values, variable: x}
                return evaluate(sides[0], at, meter) - evaluate(sides[1], at, meter)

            at_0, at_1, at_3 = residual(mpmath.mpf(0)), residual(mpmath.mpf(1)), residual(mpmath.mpf(3))
            slope = at_1 - at_0
            if abs(slope) < 1e-30 or abs(at_3 - at_0 - 3 * slope) > 1e-30 * abs(slope):
                return False
            if abs(residual(evaluate(solution, values, meter))) > 1e-30 * (1 + abs(slope)):
                return False
    return True
