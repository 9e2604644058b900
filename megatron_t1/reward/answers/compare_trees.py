r"""Whether two trees of latex.py have the same value, or two relations of them say the same.

Two expressions are equal when they agree at 50 digits and again at 400 or more (so 2^1000 and 2^1000 + 1 differ, and
sin(pi) is 0 but pi/10^25 is not), at points of which there are enough for their kind:

- analytic in their variables: two random points of six digits. A difference that is not 0 everywhere is 0 there with
  probability 0.
- in pieces (|x|, max, roots, floor): all of 12 random points of both signs and several sizes. A false answer that is
  right on a share p of them passes with p^12: 2% for the half-right p = 0.7.
- for whole numbers (n!, binomials, sums up to n, floor of n, (-1)^n): at least 8 of the points 1, 2, 3, ... where both
  are defined. This proves polynomials below degree 8, and a formula fitted to pass needs 8 constants of its own.

Only points where the gold is real count, as long as there are any: 1/sqrt(n) says n > 0. Unknown functions f(x) get
pseudo-random values, so f(x) + 1 equals 1 + f(x) and nothing else.

Left out: the values of infinite sums, integrals and limits (they only equal themselves), and everything that needs a
solver.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef

from megatron_t1.reward.answers.evaluate import COMPUTED, SALT, Meter, Values, evaluate, magnitude
from megatron_t1.reward.answers.relations import MIRRORED
from megatron_t1.reward.answers.tokens import UndecidableError
from megatron_t1.reward.answers.trees import Binder

LOW_DIGITS, HIGH_DIGITS, MOST_DIGITS = 50, 400, 5000
NUM_POINTS = 12
ENOUGH_ANALYTIC, ENOUGH_WHOLE = 2, 8
MAX_PARAMETERS = 3
_INTEGER_NAMES = {"k", "n", "m", "l"}
_WHOLE_NAMES = _INTEGER_NAMES | {"N", "i", "j", "p", "q", "r"}
_WHOLE_FUNCTIONS = {"floor", "ceiling", "gcd", "lcm", "bmod", "pmod"}
_IN_PIECES = {"Abs", "Max", "Min", *_WHOLE_FUNCTIONS}
_FEW, _MANY = (*range(1, 13), 15, 20, 31), (64, 99, 100, 365, 1001, 9999)
Sides = tuple[Any, Any]
"""Trees left and right of an operator."""


def _counts(node: Any) -> bool:
    """Whether a node makes sense for whole numbers only: n!, binomials, sums up to n, (-1)^n, floor(n/2)."""
    if not node.free_symbols:
        return False
    if isinstance(node, Binder):
        return node.args[0].name in ("sum", "prod") and any(b.free_symbols for b in node.args[3:])
    if node.is_Pow:
        return bool(node.base == -1)
    if type(node).__name__ in _WHOLE_FUNCTIONS:
        return {s.name for s in node.free_symbols} <= _WHOLE_NAMES
    return isinstance(node, (sympy.factorial, sympy.factorial2, sympy.binomial))


def _in_pieces(node: Any) -> bool:
    return type(node).__name__ in _IN_PIECES or bool(node.is_Pow and not node.exp.is_Integer and node.base.free_symbols)


def is_open(tree: Any, meter: Meter) -> bool:
    """Whether an expression says no value by itself: two variables or more, a function of its own, a limit. One that
    has the same value whatever these are says it: xy - xy + 6, a finite sum.

    Raises:
        UndecidableError: see `same_value`.
    """
    functions = {type(node).__name__ for node in tree.atoms(AppliedUndef)} - COMPUTED
    if not (len(tree.free_symbols) > 1 or functions or tree.has(Binder)):
        return False
    points = (_points([tree], False)[0] * 2)[:4]
    with mpmath.workdps(LOW_DIGITS):
        found = [evaluate(tree, {**values, SALT: str(i)}, meter) for i, values in enumerate(points)]
        return not all(_close(value, found[0]) for value in found[1:])


def _points(trees: list[Any], has_imaginary_unit: bool) -> tuple[list[Values], int]:
    """Values of the variables to try, and at how many they must agree; reproducible, never a mathematical constant."""
    names = sorted({s.name for tree in trees for s in tree.free_symbols})
    if not names:
        return [{}], 1
    nodes = [node for tree in trees for node in sympy.preorder_traversal(tree)]
    generator = random.Random(20250121)
    if counting := [node for node in nodes if _counts(node)]:
        light = all(type(node).__name__ in _WHOLE_FUNCTIONS or node.is_Pow for node in counting)
        whole = _FEW + _MANY if light else _FEW
        if len(names) == 1:
            return [{names[0]: mpmath.mpf(n)} for n in whole], ENOUGH_WHOLE
        some = [generator.sample(range(1, 13), min(len(names), 12)) for _ in range(3 * NUM_POINTS)]
        tried = [dict(zip(names, map(mpmath.mpf, values), strict=False)) for values in sorted(some, key=sum)]
        return tried, ENOUGH_WHOLE
    tried = []
    for i in range(NUM_POINTS):
        sizes = [generator.randrange(1_000, 60_000) for _ in names]
        signs = [generator.choice((-1, 1)) if i >= 3 or i == 1 else 1 for _ in names]
        values: Values = {
            name: sign * mpmath.mpf(size) / (9973 if i % 4 < 2 else 99_991)
            for name, sign, size in zip(names, signs, sizes, strict=True)
        }
        if has_imaginary_unit and "i" in values:
            values["i"] = mpmath.mpc(0, 1)
        tried.append(values)
    return tried, NUM_POINTS if any(map(_in_pieces, nodes)) else ENOUGH_ANALYTIC


def _close(a: Any, b: Any) -> bool:
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        raise UndecidableError("not finite")
    return bool(abs(a - b) <= mpmath.mpf(10) ** (-int(mpmath.mp.dps * 0.8)) * max(abs(a), abs(b)))


def _vanishes(low: Any, high: Any) -> bool:
    """Zero but for rounding: what was left at few digits shrinks with the digits; a tiny number stays."""
    return bool(high == 0 or (abs(low) < 1e-35 and abs(high) < abs(low) * mpmath.mpf(10) ** (-HIGH_DIGITS // 2)))


def _uses_i_as_unit(trees: list[Any]) -> bool:
    names = {s.name for tree in trees for s in tree.free_symbols}
    return "i" in names and (not ({"j", "k", "n", "m"} & names) or any(map(_turns, trees)))


def _turns(tree: Any) -> bool:
    r"""Whether it has a power of e to some i \pi, as the n-th roots of 1 have."""
    turn = {sympy.Symbol("i"), sympy.pi}
    return any(node.base == sympy.E and turn <= node.exp.atoms() for node in tree.atoms(sympy.Pow, sympy.exp))


def same_value(a: Any, b: Any, meter: Meter) -> bool:
    """Whether two trees have the same value, for all values of their variables.

    Raises:
        UndecidableError: one of them cannot be evaluated within bounds.
    """
    return any(_same_value(a, named, meter) for named in _renamed(a, b))


def _renamed(a: Any, b: Any) -> Iterator[Any]:
    """`b` with its parameters named as those of `a`: k for n in families of angles, constants of integration."""
    only_a, only_b = (sorted(x.free_symbols - y.free_symbols, key=str) for x, y in ((a, b), (b, a)))
    numbered = [sorted((s for s in x.free_symbols if _NUMBERED.fullmatch(s.name)), key=str) for x in (a, b)]
    if any(numbered):  # C_1 and C_2, A and B
        lettered = [[s for s in own if s.name in ("A", "B", "C", "D")] for own in (only_a, only_b)]
        only_a, only_b = (own or others for own, others in zip(numbered, lettered, strict=True))
    angles = {s.name for s in (*only_a, *only_b)} <= _INTEGER_NAMES and len(only_a) == 1 and _counts_turns(a, only_a[0])
    added = all(s.name in _CONSTANTS and s in x.args for x, own in ((a, only_a), (b, only_b)) for s in own)
    added &= all(s.name != "c" for s in only_a) or bool(_VARIABLES & {s.name for s in a.free_symbols})
    if len(only_a) != len(only_b) or len(only_a) > MAX_PARAMETERS or not (any(numbered) or angles or added):
        yield b
        return
    for order in itertools.permutations(only_a):
        yield b.xreplace(dict(zip(only_b, order, strict=True)))


def _counts_turns(tree: Any, letter: Any) -> bool:
    r"""Whether a letter numbers angles, as in \frac{\pi}{4} + k\pi: what is squared or divided by is no number of them,
    but for an angle as a whole."""
    nodes = [node for node in sympy.preorder_traversal(tree) if letter in node.free_symbols]
    for node in nodes:
        if node.is_Pow and letter in node.base.free_symbols and sympy.pi not in node.base.atoms():
            return False
        if node.is_Mul and sum(letter in factor.free_symbols for factor in node.args) > 1:
            return False
    return sympy.pi in tree.atoms()


def are_one_family(a: Any, b: Any, meter: Meter) -> bool:
    """Whether two functions are one family, C e^x and A e^x: each a multiple of one constant of its own.

    Raises:
        UndecidableError: see `same_value`.
    """
    only_a, only_b = a.free_symbols - b.free_symbols, b.free_symbols - a.free_symbols
    families = all(len(own) == 1 and {s.name for s in own} <= _FACTORS for own in (only_a, only_b))
    is_function = bool((_VARIABLES | {"arg"}) & {s.name for s in a.free_symbols})
    if not (families and is_function):
        return False
    (own,) = only_a
    multiplies = same_value(a.xreplace({own: 2 * own}), sympy.Mul(2, a, evaluate=False), meter)
    return multiplies and same_value(a, b.xreplace(dict(zip(only_b, only_a, strict=True))), meter)


_CONSTANTS = ("C", "c", "K")
_FACTORS = {"A", "C", "K", "c", "k", "C_1", "C_0"}
"""Constants of a family also where they multiply."""
_VARIABLES = set("rstuvwxyz") | {"theta"}
"""Of functions: without one of them, c is no constant of integration."""
_NUMBERED = re.compile(r"[Cc]_\{?\d+\}?")


def _same_value(a: Any, b: Any, meter: Meter) -> bool:
    if a == b:
        return True
    unit = _uses_i_as_unit([a, b])
    points, enough = _points([a, b], unit)
    real = unreal = 0
    unreal_agree = True
    for values in points:
        try:
            agree, is_real = _agree(a, b, values, max(real, unreal) < ENOUGH_ANALYTIC, meter)
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
        except UndecidableError:
            if real < ENOUGH_WHOLE:  # else the larger numbers are too much work, and no news
                raise
            break
        if is_real or unit or not values:
            if not agree:
                return False
            real += 1
            if real == enough < NUM_POINTS and enough != ENOUGH_WHOLE:
                return True
        else:
            unreal, unreal_agree = unreal + 1, unreal_agree and agree
    if not real and not unreal:
        raise UndecidableError("undefined at every point tried")
    if enough == ENOUGH_WHOLE and real + unreal < enough:
        raise UndecidableError(f"defined at {real + unreal} of the {len(points)} points tried: too few")
    return real > 0 or unreal_agree


def _agree(a: Any, b: Any, values: Values, fully: bool, meter: Meter) -> tuple[bool, bool]:
    """(whether the gold `a` and the answer `b` have one value at a point, whether the gold's is real)."""
    with mpmath.workdps(LOW_DIGITS):
        meter.left_the_reals = False
        gold = evaluate(a, values, meter)
        is_real = not meter.left_the_reals
        low = gold, evaluate(b, values, meter)
        both_tiny = abs(low[0]) < 1e-35 and abs(low[1]) < 1e-35
        if not both_tiny and not _close(*low):
            return False, is_real
        needed = int(max(magnitude(low[0]), 0) * 1.3) + 50
    if not (fully or both_tiny or needed > LOW_DIGITS + 40):
        return True, is_real
    if needed > MOST_DIGITS:
        raise UndecidableError("too large to tell from its neighbours")
    with mpmath.workdps(max(HIGH_DIGITS, needed)):
        high = evaluate(a, values, meter), evaluate(b, values, meter)
        zeros = [_vanishes(x, y) for x, y in zip(low, high, strict=True)]
        return not (any(zeros) != all(zeros) or (not any(zeros) and not _close(*high))), is_real


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


def _same_sides(gold: Sides, answer: Sides, meter: Meter) -> bool:
    return all(same_value(g, a, meter) for g, a in zip(gold, answer, strict=True))


def same_relation(gold: Sides, gold_operator: str, answer: Sides, answer_operator: str, meter: Meter) -> bool:
    """Whether `L op R` and `L' op' R'` say the same: L - R is a constant multiple of L' - R', of the right sign, at as
    many points as two expressions need, where the gold is real as there.

    Raises:
        UndecidableError: see `same_value`.
    """
    trees = [*gold, *answer]
    points, enough = _points(trees, _uses_i_as_unit(trees))
    points = points[: max(enough, 4)]
    if not points[0]:
        return gold_operator == answer_operator and _same_sides(gold, answer, meter)
    if gold[0].free_symbols | gold[1].free_symbols != answer[0].free_symbols | answer[1].free_symbols:
        return False
    reals, others = list[Sides](), list[Sides]()
    with mpmath.workdps(LOW_DIGITS):
        for values in points:
            meter.left_the_reals = False
            g = _difference(gold, values, meter)
            found = others if meter.left_the_reals else reals
            found.append((g, _difference(answer, values, meter)))
        differences = [(abs(g) < 1e-30, abs(a) < 1e-30, g, a) for g, a in reals or others]
        if any(g_is_0 != a_is_0 for g_is_0, a_is_0, _, _ in differences):
            return False
        ratios = [a / g for is_0, _, g, a in differences if not is_0]
        if len(ratios) < 2 or not all(_close(r, ratios[0]) for r in ratios[1:]):
            return False
        for name in points[0]:  # one that cancels, as x in "cos^2 x = 1 - sin^2 x + C", is compared with its side
            moved = {**points[0], name: points[1].get(name, 0)}
            if _close(_difference(gold, moved, meter), _difference(gold, points[0], meter)):
                return _same_sides(gold, answer, meter)
        positive = mpmath.re(ratios[0]) > 0
    return answer_operator == (gold_operator if positive else MIRRORED.get(gold_operator, gold_operator))


def _difference(sides: Sides, values: Values, meter: Meter) -> Any:
    return evaluate(sides[0], values, meter) - evaluate(sides[1], values, meter)


_MORE_POINTS = (mpmath.mpf(3), mpmath.mpf(-2), mpmath.mpf(17) / 8)
"""Where a line through its values at 0 and 1 must go on."""


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
    nodes = (node for side in sides for node in sympy.preorder_traversal(side) if _in_pieces(node))
    if any(variable in {s.name for s in node.free_symbols} for node in nodes):  # |x| = 5
        return False
    with mpmath.workdps(LOW_DIGITS):
        for values in _points([*sides, solution], False)[0][:4]:

            def residual(x: Any, values: Values = values) -> Any:
                return _difference(sides, {**values, variable: x}, meter)

            at_0 = residual(mpmath.mpf(0))
            slope = residual(mpmath.mpf(1)) - at_0
            on_a_line = (abs(residual(x) - at_0 - x * slope) <= 1e-30 * abs(slope) for x in _MORE_POINTS)
            if abs(slope) < 1e-30 or not all(on_a_line):
                return False
            if abs(residual(evaluate(solution, values, meter))) > 1e-30 * (1 + abs(slope)):
                return False
    return True
