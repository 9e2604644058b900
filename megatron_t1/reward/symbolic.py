r"""Equality of two LaTeX expressions: parsed by math-verify's parser, compared by value at many digits.

Only ever called inside a worker process that may be killed. Nothing is simplified, solved or evaluated by SymPy: the
parsed tree is walked by a small evaluator on mpmath numbers whose cost is bounded. Two expressions are equal when they
agree at 50 digits and again at 1,500 (so 2^1000 and 2^1000 + 1 differ, and sin(pi) is 0 but pi/10^25 is not), at
several random complex-free points when they have variables. Unknown functions f(x) get pseudo-random values, so
f(x) + 1 equals 1 + f(x) and nothing else.

Left out: Sum, Integral, Limit with symbolic bounds, and everything that needs a solver.
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

MAX_EXPRESSION_CHARS = 1500
"""Longest expression parsed: golds stay below 400; ANTLR needs about 1 ms a 10 characters."""
MAX_NESTING = 40
MAX_MAGNITUDE = 10**5
"""Largest |log10| of an intermediate value."""
MAX_TERMS = 20_000
"""Most terms summed or multiplied for an explicit sum or product."""
LOW_DIGITS, HIGH_DIGITS = 50, 1500
NUM_POINTS = 4


class CannotDecide(Exception):
    """The expression cannot be read, or is too large to be worth comparing."""


def check_size(latex: str) -> None:
    """Refuse what is expensive to parse.

    Raises:
        CannotDecide: too long or too deeply nested.
    """
    if len(latex) > MAX_EXPRESSION_CHARS:
        raise CannotDecide(f"{len(latex)} characters")
    depth = deepest = 0
    for char in latex:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    if deepest > MAX_NESTING:
        raise CannotDecide(f"nested {deepest} deep")


@functools.lru_cache(maxsize=512)
def parse(latex: str) -> Any:
    """SymPy tree of a normalised LaTeX expression, unevaluated.

    Raises:
        CannotDecide: not an expression the parser knows.
    """
    check_size(latex)
    if "!" in latex and any(len(n) > 4 for n in re.findall(r"\d+", latex)):
        raise CannotDecide("factorial of a large number")
    for n in re.findall(r"\\binom\s*\{\s*(\d+)", latex) + re.findall(r"\\binom\{[^{}]*\}\s*\{\s*(\d+)", latex):
        if len(n) > 4:
            raise CannotDecide("binomial of a large number")
    degrees = re.sub(
        r"(\d+(?:\.\d+)?|\\(?:alpha|beta|theta|phi)|(?<![a-zA-Z\\])[a-z])\s*\^\\circ",
        r"(\1\\cdot\\frac{\\pi}{180})",
        latex,
    )
    source = re.sub(r"\\ldots", r"\\Xi ", degrees)
    source = re.sub(r"\\text\{\s*([A-Za-z])\s*\}", r"\1", source)
    source = re.sub(r"(\d+(?:\.\d+)?)[eE]([+-]?\d+)", r"\1\\cdot 10^{\2}", source)
    try:
        return latex2sympy(
            source, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
    except RecursionError as error:
        raise CannotDecide("too deep") from error
    except Exception as error:
        raise CannotDecide("not readable as mathematics") from error


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
        raise CannotDecide("power too large")
    if base == 0 and mpmath.re(exponent) <= 0:
        raise CannotDecide("0 to a power that is not positive")
    return base**exponent


def _exp(x: Any) -> Any:
    if abs(x) > MAX_MAGNITUDE:
        raise CannotDecide("exponential too large")
    return mpmath.exp(x)


def _gamma_like(name: str, args: list[Any]) -> Any:
    if any(abs(a) > 10_000 for a in args):
        raise CannotDecide(f"{name} of a large number")
    return mpmath.factorial(args[0]) if name == "factorial" else mpmath.binomial(args[0], args[1])


def _log(x: Any, base: Any = None) -> Any:
    if x == 0 or (base is not None and mpmath.log(base) == 0):
        raise CannotDecide("logarithm of 0")
    return mpmath.log(x) if base is None else mpmath.log(x) / mpmath.log(base)


def _series(node: Any, values: Values) -> Any:
    """Explicit finite sums and products only."""
    if len(node.args) != 2:
        raise CannotDecide("nested sum")
    name, low, high = node.args[1]
    first, last = evaluate(low, values), evaluate(high, values)
    if not (mpmath.isint(first) and mpmath.isint(last)) or last - first > MAX_TERMS:
        raise CannotDecide("sum without explicit small bounds")
    is_sum = type(node).__name__ == "Sum"
    total = mpmath.mpf(0 if is_sum else 1)
    for k in range(int(first), int(last) + 1):
        term = evaluate(node.args[0], {**values, str(name): mpmath.mpf(k)})
        total = total + term if is_sum else total * term
        if _magnitude(total) > MAX_MAGNITUDE:
            raise CannotDecide("series too large")
    return total


def evaluate(node: Any, values: Values) -> Any:
    """Value of a parsed tree at the current mpmath precision; symbols are looked up in `values` or made up by name.

    Raises:
        CannotDecide: undefined, too large, or a kind of node that is not supported.
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
    if not node.args:
        raise CannotDecide(f"{name} has no value")
    args = [evaluate(a, values) for a in node.args] if name not in ("Limit", "Integral", "Derivative") else []
    if node.is_Add:
        return functools.reduce(lambda a, b: a + b, args)
    if node.is_Mul:
        product = functools.reduce(lambda a, b: a * b, args)
        if _magnitude(product) > MAX_MAGNITUDE:
            raise CannotDecide("product too large")
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
            raise CannotDecide("angle too large")
        if name in ("Max", "Min", "floor", "ceiling"):
            args = [mpmath.re(a) for a in args]
        return _ELEMENTARY[name](*args)
    if isinstance(node, sympy.Function) and args:
        key = name + "|" + "|".join(mpmath.nstr(a, 20) for a in args)
        return values.setdefault(key, _made_up(key))
    raise CannotDecide(f"{name} is not supported")


def _made_up(key: str) -> Any:
    """A reproducible irrational-looking number for a name, the same in every process and at every precision."""
    generator = random.Random(zlib.crc32(key.encode()))
    return mpmath.mpf(generator.randrange(10**12, 10**13)) / (10**12 + generator.randrange(10**6)) + mpmath.mpf(1) / 7


def points(trees: list[Any], has_imaginary_unit: bool) -> list[Values]:
    """Values of the variables to try: positive and negative, rational, reproducible."""
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
        raise CannotDecide("not finite")
    scale = max(abs(a), abs(b))
    tolerance = mpmath.mpf(10) ** (-int(mpmath.mp.dps * 0.8))
    if abs(a) < tolerance and abs(b) < tolerance:  # 0 up to rounding, or tiny: higher precision tells them apart
        return True
    return bool(abs(a - b) <= tolerance * scale)


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
    unit = _uses_i_as_unit(trees)
    decided = 0
    for digits in (LOW_DIGITS, HIGH_DIGITS):
        with mpmath.workdps(digits):
            for values in points(trees, unit):
                try:
                    x, y = evaluate(a, values), evaluate(b, values)
                except (ZeroDivisionError, ValueError, OverflowError):
                    continue
                if not _close(x, y):
                    return False
                decided += digits == HIGH_DIGITS
    if not decided:
        raise CannotDecide("undefined at every point tried")
    return True


def expressions_equal(gold: str, answer: str) -> bool:
    """Whether two normalised LaTeX expressions have the same value (for all values of their variables).

    Raises:
        CannotDecide: one of them cannot be read or evaluated within bounds.
    """
    return _same_trees(parse(gold), parse(answer))


def decimal_value(latex: str) -> Any:
    """Real value of a constant expression as an mpf of `LOW_DIGITS` digits; None when it has variables or is complex.

    Raises:
        CannotDecide: see `expressions_equal`.
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
        CannotDecide: see `expressions_equal`.
    """
    flipped = {"<": ">", ">": "<", "le": "ge", "ge": "le", "=": "=", "ne": "ne"}
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
