r"""Equality of two LaTeX expressions: read by latex.py (or math-verify's parser), compared by value at many digits.

Only ever called inside a worker process that may be killed. Two expressions are equal when they agree at 50 digits and
again at 400 or more (so 2^1000 and 2^1000 + 1 differ, and sin(pi) is 0 but pi/10^25 is not), at several random points
when they have variables. Unknown functions f(x) get pseudo-random values, so f(x) + 1 equals 1 + f(x) and nothing else.

math-verify's ANTLR parser reads more, and takes minutes on some texts. It is asked only when latex.py cannot read the
*gold*: a model's text alone never leads there, and an answer that only ANTLR could read is no spelling of a gold that
is plain.

Left out: the values of infinite sums, integrals and limits (they only equal themselves), and everything that needs a
solver.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef

from megatron_t1.reward.answers.latex import UndecidableError, parse_latex
from megatron_t1.reward.answers.numeric import Values, evaluate, magnitude
from megatron_t1.reward.answers.trees import Binder

LOW_DIGITS, HIGH_DIGITS, MOST_DIGITS = 50, 400, 5000
NUM_POINTS = 4
_INTEGER_NAMES = {"k", "n", "m", "l"}


_parse = functools.lru_cache(maxsize=512)(parse_latex)


def _counts(node: Any) -> bool:
    """Whether a node makes sense for whole numbers only: n!, binomials, sums up to n."""
    if isinstance(node, Binder):
        return node.args[0].name in ("sum", "prod") and any(b.free_symbols for b in node.args[3:])
    return isinstance(node, (sympy.factorial, sympy.binomial)) and bool(node.free_symbols)


def is_open(latex: str) -> bool:
    """Whether an expression says no value by itself: two variables or more, a function of its own, a limit."""
    try:
        tree = _parse(latex)
    except UndecidableError:
        return False
    return len(tree.free_symbols) > 1 or tree.has(Binder, AppliedUndef)


def points(trees: list[Any], has_imaginary_unit: bool) -> list[Values]:
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


def _same_trees(a: Any, b: Any) -> bool:
    trees = [a, b]
    if a == b:
        return True
    variables = points(trees, _uses_i_as_unit(trees))
    decided = 0
    for values in variables:
        try:
            with mpmath.workdps(LOW_DIGITS):
                low = evaluate(a, values), evaluate(b, values)
                both_tiny = abs(low[0]) < 1e-35 and abs(low[1]) < 1e-35
                if not both_tiny and not _close(*low):
                    return False
                needed = int(max(magnitude(low[0]), 0) * 1.3) + 50
            if needed > MOST_DIGITS:
                raise UndecidableError("too large to tell from its neighbours")
            with mpmath.workdps(max(HIGH_DIGITS, needed)):
                high = evaluate(a, values), evaluate(b, values)
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


def expressions_equal(gold: str, answer: str) -> bool:
    """Whether two normalised LaTeX expressions have the same value (for all values of their variables).

    Raises:
        UndecidableError: one of them cannot be read or evaluated within bounds.
    """
    a, b = _parse(gold), _parse(answer)
    ours, theirs = (
        sorted(s.name for s in a.free_symbols - b.free_symbols),
        [s.name for s in b.free_symbols - a.free_symbols],
    )
    if len(ours) == len(theirs) == 1 and {*ours, *theirs} <= _INTEGER_NAMES and sympy.pi in a.atoms():
        b = b.xreplace({sympy.Symbol(theirs[0]): sympy.Symbol(ours[0])})  # k pi and n pi are the same family
    return _same_trees(a, b)


def decimal_value(latex: str) -> Any:
    """Real value of a constant expression as an mpf of `LOW_DIGITS` digits; None when it has variables or is complex.

    Raises:
        UndecidableError: see `expressions_equal`.
    """
    tree = _parse(latex)
    if tree.free_symbols:
        return None
    with mpmath.workdps(LOW_DIGITS):
        value = evaluate(tree, {})
        return value if not isinstance(value, mpmath.mpc) else (value.real if abs(value.imag) < 1e-30 else None)


def relations_equal(gold: tuple[str, str, str], answer: tuple[str, str, str]) -> bool:
    """Whether `L op R` and `L' op' R'` say the same: L - R is a constant multiple of L' - R', of the right sign.

    Raises:
        UndecidableError: see `expressions_equal`.
    """
    flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
    trees = [_parse(side) for side in (gold[0], gold[2], answer[0], answer[2])]
    if trees[0].free_symbols | trees[1].free_symbols != trees[2].free_symbols | trees[3].free_symbols:
        return False
    ratios = []
    with mpmath.workdps(LOW_DIGITS):
        for values in points(trees, _uses_i_as_unit(trees)):
            g = evaluate(trees[0], values) - evaluate(trees[1], values)
            a = evaluate(trees[2], values) - evaluate(trees[3], values)
            if abs(g) < 1e-30 or abs(a) < 1e-30:
                return False
            ratios.append(a / g)
        if len(ratios) < 2 or not all(_close(r, ratios[0]) for r in ratios[1:]):
            return False
        positive = mpmath.re(ratios[0]) > 0
    return answer[1] == (gold[1] if positive else flipped[gold[1]])


def solves(left: str, right: str, name: str, value: str) -> bool:
    """Whether `name = value` is the one solution of left = right, in which `name` is linear.

    Without a name, the one variable of the equation that the value does not have is meant: 6/x solves x y = 6.

    Raises:
        UndecidableError: see `expressions_equal`.
    """
    *sides, solution = _parse(left), _parse(right), _parse(value)
    names = {s.name for s in sides[0].free_symbols | sides[1].free_symbols}
    unknown = {name} if name else names - {s.name for s in solution.free_symbols}
    if len(unknown) != 1 or not unknown <= names:
        return False
    variable = unknown.pop()
    with mpmath.workdps(LOW_DIGITS):
        for values in points([*sides, solution], False):

            def residual(x: Any, values: Values = values) -> Any:
                at = {**values, variable: x}
                return evaluate(sides[0], at) - evaluate(sides[1], at)

            at_0, at_1, at_3 = residual(mpmath.mpf(0)), residual(mpmath.mpf(1)), residual(mpmath.mpf(3))
            slope = at_1 - at_0
            if abs(slope) < 1e-30 or abs(at_3 - at_0 - 3 * slope) > 1e-30 * abs(slope):
                return False
            if abs(residual(evaluate(solution, values))) > 1e-30 * (1 + abs(slope)):
                return False
    return True
