r"""Equality of two LaTeX expressions: parsed by math-verify's parser, compared by value at many digits.

Only ever called inside a worker process that may be killed. Nothing is simplified, solved or evaluated by SymPy: the
parsed tree is walked by a small evaluator on mpmath numbers whose cost is bounded. Two expressions are equal when they
agree at 50 digits and again at 1,500 (so 2^1000 and 2^1000 + 1 differ, and sin(pi) is 0 but pi/10^25 is not), at
several random complex-free points when they have variables. Unknown functions f(x) get pseudo-random values, so
f(x) + 1 equals 1 + f(x) and nothing else.

Left out: the values of infinite sums, integrals and limits (they only equal themselves), and everything that needs a
solver.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.matrices import MatrixBase

from megatron_t1.reward.latex import UndecidableError, parse_latex

MAX_EXPRESSION_CHARS = 600
"""Longest expression parsed: golds stay below 400, and ANTLR needs up to 2 ms a character."""
MAX_NESTING = 15
MAX_MAGNITUDE = 10**5
"""Largest |log10| of an intermediate value."""
MAX_TERMS = 20_000
"""Most terms summed or multiplied for an explicit sum or product."""
LOW_DIGITS, HIGH_DIGITS, MOST_DIGITS = 50, 400, 5000
NUM_POINTS = 4
_INTEGER_NAMES = {"k", "n", "m", "l"}


def check_size(latex: str) -> None:
    """Refuse what is expensive to parse.

    Raises:
        UndecidableError: too long or too deeply nested.
    """
    if len(latex) > MAX_EXPRESSION_CHARS:
        raise UndecidableError(f"{len(latex)} characters")
    depth = deepest = 0
    for char in latex:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    if deepest > MAX_NESTING:
        raise UndecidableError(f"nested {deepest} deep")


@functools.lru_cache(maxsize=512)
def parse(latex: str) -> Any:
    """SymPy tree of a normalised LaTeX expression, unevaluated.

    Raises:
        UndecidableError: not an expression that latex.py or math-verify's parser knows.
    """
    try:
        return parse_latex(latex)
    except UndecidableError as error:
        if "\\" not in latex:
            raise
        reason = error
    check_size(latex)
    if len(re.findall(r"\\(?:int|sum|prod|lim)(?![a-z])", latex)) > 1:
        raise UndecidableError("nested sums, integrals or limits")
    if any(len(n) > 4 for n in re.findall(r"\d+", latex)) and re.search(r"!|\\binom", latex):
        raise UndecidableError("factorial or binomial of a large number")
    try:
        return latex2sympy(
            latex, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
    except (OSError, MemoryError):  # ours, not the text's
        raise
    except Exception as error:
        raise reason from error


Values = dict[str, Any]
_ELEMENTARY: dict[str, Callable[..., Any]] = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan, "acot": mpmath.acot, "sinh": mpmath.sinh,
    "cosh": mpmath.cosh, "tanh": mpmath.tanh, "asinh": mpmath.asinh, "acosh": mpmath.acosh, "atanh": mpmath.atanh,
    "Abs": mpmath.fabs, "floor": mpmath.floor, "ceiling": mpmath.ceil, "re": mpmath.re, "im": mpmath.im,
    "conjugate": mpmath.conj, "Max": max, "Min": min, "UnevaluatedExpr": lambda x: x,
}  # fmt: skip


def _magnitude(x: Any) -> float:
    x = abs(x)
    return float(mpmath.log10(x)) if x > 0 and mpmath.isfinite(x) else 0.0


def _power(base: Any, exponent: Any) -> Any:
    if _magnitude(exponent) > 8 or abs(float(mpmath.re(exponent)) * _magnitude(base)) > MAX_MAGNITUDE:
        raise UndecidableError("power too large")
    if base == 0 and mpmath.re(exponent) <= 0:
        raise UndecidableError("0 to a power that is not positive")
    return base**exponent


def _exp(x: Any) -> Any:
    if abs(x) > MAX_MAGNITUDE:
        raise UndecidableError("exponential too large")
    return mpmath.exp(x)


def _gamma_like(name: str, args: list[Any]) -> Any:
    if any(abs(a) > 10_000 for a in args):
        raise UndecidableError(f"{name} of a large number")
    return mpmath.factorial(args[0]) if name == "factorial" else mpmath.binomial(args[0], args[1])


def _log(x: Any, base: Any = None) -> Any:
    if x == 0 or (base is not None and mpmath.log(base) == 0):
        raise UndecidableError("logarithm of 0")
    return mpmath.log(x) if base is None else mpmath.log(x) / mpmath.log(base)


def _series(node: Any, values: Values) -> Any:
    """Finite sums and products with numbers as bounds are summed; others only equal themselves."""
    if len(node.args) != 2:
        raise UndecidableError("nested sum")
    name, low, high = node.args[1]
    if low.free_symbols or high.free_symbols or not high.is_finite:
        return _opaque(node, str(name), values)
    first, last = evaluate(low, values), evaluate(high, values)
    if not (mpmath.isint(first) and mpmath.isint(last)) or last - first > MAX_TERMS:
        raise UndecidableError("sum without small bounds")
    is_sum = type(node).__name__ == "Sum"
    total = mpmath.mpf(0 if is_sum else 1)
    for k in range(int(first), int(last) + 1):
        term = evaluate(node.args[0], {**values, str(name): mpmath.mpf(k)})
        total = total + term if is_sum else total * term
        if _magnitude(total) > MAX_MAGNITUDE:
            raise UndecidableError("series too large")
    return total


def _opaque(node: Any, bound: str, values: Values) -> Any:
    """A made-up value for a sum, integral or limit: the same for the same body and the same bounds."""
    at = {**values, bound: _made_up("bound variable")}
    parts = [evaluate(node.args[0], at)]
    for arg in node.args[1:]:
        limits = [a for a in (arg.args or (arg,)) if str(a) not in (bound, "+", "-", "+-")]
        parts += [sympy.oo if a in (sympy.oo, -sympy.oo) else evaluate(a, values) for a in limits]
    key = type(node).__name__ + "|" + "|".join(str(p) if p is sympy.oo else mpmath.nstr(p, 20) for p in parts)
    return values.setdefault(key, _made_up(key))


def evaluate(node: Any, values: Values) -> Any:
    """Value of a parsed tree at the current mpmath precision; symbols are looked up in `values` or made up by name.

    Raises:
        UndecidableError: undefined, too large, or a kind of node that is not supported.
    """
    name = type(node).__name__
    if node.is_Symbol:
        return values.setdefault(node.name, _made_up(node.name))
    if node.is_Integer:
        return mpmath.mpf(int(node))
    if node.is_Rational:
        return mpmath.mpf(int(node.p)) / int(node.q)
    if node.is_Float:
        return mpmath.mpf(str(node))
    if node is sympy.pi:
        return +mpmath.pi
    if node is sympy.E:
        return +mpmath.e
    if node is sympy.I:
        return mpmath.mpc(0, 1)
    if name in ("Sum", "Product"):
        return _series(node, values)
    if name == "Integral" and len(node.args) == 2:
        return _opaque(node, str(node.args[1][0]), values)
    if name == "Limit":
        return _opaque(node, str(node.args[1]), values)
    if name in ("Integral", "Derivative") or not node.args:
        raise UndecidableError(f"{name} is not evaluated")
    args = [evaluate(a, values) for a in node.args]
    if node.is_Add:
        return functools.reduce(lambda a, b: a + b, args)
    if node.is_Mul:
        product = functools.reduce(lambda a, b: a * b, args)
        if _magnitude(product) > MAX_MAGNITUDE:
            raise UndecidableError("product too large")
        return product
    if node.is_Pow:
        return _power(*args)
    if name == "exp":
        return _exp(args[0])
    if name == "log":
        return _log(*args)
    if name in ("factorial", "binomial"):
        return _gamma_like(name, args)
    if name in _ELEMENTARY:
        if name in ("sin", "cos", "tan") and _magnitude(args[0]) > 1000:
            raise UndecidableError("angle too large")
        if name in ("Max", "Min", "floor", "ceiling"):
            args = [mpmath.re(a) for a in args]
        return _ELEMENTARY[name](*args)
    if isinstance(node, sympy.Function) and args:
        key = name + "|" + "|".join(mpmath.nstr(a, 20) for a in args)
        return values.setdefault(key, _made_up(key))
    raise UndecidableError(f"{name} is not supported")


def _made_up(key: str) -> Any:
    """A reproducible irrational-looking number for a name, the same in every process and at every precision."""
    generator = random.Random(zlib.crc32(key.encode()))
    return mpmath.mpf(generator.randrange(10**12, 10**13)) / (10**12 + generator.randrange(10**6)) + mpmath.mpf(1) / 7


def points(trees: list[Any], has_imaginary_unit: bool) -> list[Values]:
    """Values of the variables to try: positive and negative, rational, reproducible; never a mathematical constant."""
    names = sorted({s.name for tree in trees for s in tree.free_symbols})
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
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase)) or a.shape != b.shape:
            return False
        return all(_same_trees(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(a == b)
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
                needed = int(max(_magnitude(low[0]), 0) * 1.3) + 50
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
    a, b = parse(gold), parse(answer)
    if not (isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic)):
        return _same_trees(a, b)
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
    tree = parse(latex)
    if not isinstance(tree, sympy.Expr) or tree.free_symbols:
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
    trees = [parse(side) for side in (gold[0], gold[2], answer[0], answer[2])]
    if not all(isinstance(tree, sympy.Expr) for tree in trees):
        return False
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
    sides, solution = (parse(left), parse(right)), parse(value)
    if not all(isinstance(tree, sympy.Expr) for tree in (*sides, solution)):
        return False
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
