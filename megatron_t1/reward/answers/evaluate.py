"""Values of parsed expressions, as mpmath numbers at the current precision, within a budget of work.

SymPy evaluates, simplifies and solves nothing here: its trees are only walked. Every step is charged for what it costs
at its precision before it is taken, so no tree, however hostile, takes longer than about `MAX_WORK_US`; and since the
charge is a count and not a clock, a verdict does not depend on how busy the machine is.

Unknown names and functions get reproducible made-up values. So do integrals, limits and infinite sums: they equal
themselves and nothing else.
"""

from __future__ import annotations

import functools
import math
import random
import zlib
from collections.abc import Callable
from typing import Any

import mpmath
import sympy

from megatron_t1.reward.answers.tokens import UndecidableError
from megatron_t1.reward.answers.trees import INDEX, Binder

Values = dict[str, Any]
MAX_MAGNITUDE = 10**5
"""Largest |log10| of an intermediate value."""
MAX_WORK_US = 100_000
"""Microseconds of an ordinary core that one comparison may cost; the most expensive honest one known costs 15,000."""
MAX_FACTORIAL = 10_000
MAX_GAMMA_DIGITS = 400
"""Factorials and binomials of other numbers than integers: beyond these digits mpmath needs minutes."""
_TRIGONOMETRY = "sin cos tan cot sec csc asin acos atan acot sinh cosh tanh asinh acosh atanh"
_ELEMENTARY: dict[str, Callable[..., Any]] = {name: getattr(mpmath, name) for name in _TRIGONOMETRY.split()}
_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": mpmath.fabs, "floor": lambda x: mpmath.floor(_snapped(x)),
    "ceiling": lambda x: mpmath.ceil(_snapped(x)), "Max": max, "Min": min,
}  # fmt: skip
SALT = "\\salt"
"""Among the values: what is made up differs with it."""
COMPUTED = {"bmod", "gcd", "lcm"}
"""Functions without a SymPy class that have a value."""


def _snapped(x: Any) -> Any:
    """The whole number that a value is but for rounding: the floor of the cube root of 8 is 2."""
    return mpmath.nint(x) if abs(x - mpmath.nint(x)) < mpmath.mpf(10) ** (-0.8 * mpmath.mp.dps) else x


class Meter:
    """What a comparison has cost so far."""

    def __init__(self) -> None:
        self.spent_us = 0.0
        self.left_the_reals = False
        """Whether a root or logarithm of real numbers was none."""

    def charge(self, microseconds: float) -> None:
        self.spent_us += microseconds
        if self.spent_us > MAX_WORK_US:
            raise UndecidableError("too much to compute")


def _charge_elementary(meter: Meter, times: float = 1.0) -> None:
    meter.charge(times * (60 + 3 * (mpmath.mp.dps / 50) ** 2))  # measured from 50 to 5,000 digits


def magnitude(x: Any) -> float:
    """log10 |x|, to within 0.6; 0 for 0 and infinity."""
    return float(mpmath.mag(x)) * 0.30103 if x != 0 and mpmath.isfinite(x) else 0.0


def _power(meter: Meter, base: Any, exponent: Any) -> Any:
    if magnitude(exponent) > 8 or abs(float(mpmath.re(exponent)) * magnitude(base)) > MAX_MAGNITUDE:
        raise UndecidableError("power too large")
    if base == 0 and mpmath.re(exponent) <= 0:
        raise UndecidableError("0 to a power that is not positive")
    _charge_elementary(meter, 0.2 if mpmath.isint(exponent) else 2)
    return base**exponent


def _exp(meter: Meter, x: Any) -> Any:
    if abs(x) > MAX_MAGNITUDE:
        raise UndecidableError("exponential too large")
    _charge_elementary(meter)
    return mpmath.exp(x)


def _log(meter: Meter, x: Any, base: Any = None) -> Any:
    _charge_elementary(meter)
    if x == 0 or (base is not None and mpmath.log(base) == 0):
        raise UndecidableError("logarithm of 0")
    return mpmath.log(x) if base is None else mpmath.log(x) / mpmath.log(base)


def _gamma_like(meter: Meter, name: str, args: list[Any]) -> Any:
    if any(abs(a) > MAX_FACTORIAL for a in args):
        raise UndecidableError(f"{name} of a large number")
    if all(mpmath.isint(a) and mpmath.re(a) >= 0 for a in args):
        whole = [int(mpmath.re(a)) for a in args]
        meter.charge(20 + max(whole) ** 2 / 1000)
        return mpmath.mpf(_WHOLE[name](*whole))
    meter.charge(1000)
    if name == "factorial2":
        raise UndecidableError("double factorial of a number that is not whole")
    if mpmath.mp.dps > MAX_GAMMA_DIGITS:
        raise UndecidableError(f"{name} of a number that is not whole")
    meter.charge(20_000 if mpmath.mp.dps > 100 else 0)
    return mpmath.factorial(args[0]) if name == "factorial" else mpmath.binomial(args[0], args[1])


_WHOLE: dict[str, Callable[..., int]] = {
    "factorial": math.factorial, "binomial": math.comb, "factorial2": lambda n: math.prod(range(n, 0, -2)),
}  # fmt: skip


def _real_power(meter: Meter, base: Any, exponent: Any, value: Any) -> Any:
    """`base` to the `value` of `exponent`: real when that is a fraction of odd denominator, as -2 of (-8)^{1/3}."""
    negative = mpmath.im(base) == 0 and mpmath.re(base) < 0
    if not negative or value == int(mpmath.re(value)):
        return _power(meter, base, value)
    top, bottom = exponent.as_numer_denom()
    if not (top.is_Integer and bottom.is_Integer and bottom % 2):
        return _power(meter, base, value)
    power = _power(meter, -base, value)
    return -power if top % 2 else power


def _bound(meter: Meter, name: str, body: Any, variable: Any, bounds: list[Any], values: Values) -> Any:
    """Finite sums and products are computed; what else binds a variable gets a made-up value by its body and bounds."""
    endless = any(r"\infty" in {s.name for s in b.free_symbols} for b in bounds)
    ends = [] if endless else [evaluate(b, values, meter) for b in bounds]
    indexed = any(INDEX in s.name for s in body.free_symbols)
    if name in ("sum", "prod") and len(ends) == 2 and all(map(mpmath.isint, ends)) and not indexed:
        first, last = ends
        total = mpmath.mpf(0 if name == "sum" else 1)
        for k in range(int(first), int(last) + 1):
            meter.charge(20)
            term = evaluate(body, {**values, variable.name: mpmath.mpf(k)}, meter)
            total = total + term if name == "sum" else total * term
            if magnitude(total) > MAX_MAGNITUDE:
                raise UndecidableError("series too large")
        return total
    counts = name in ("sum", "prod") and body.has(sympy.factorial, sympy.factorial2, sympy.binomial)
    at = map(mpmath.mpf, range(1, 9)) if counts else [_made_up("bound variable")]
    parts = [evaluate(body, {**values, variable.name: point}, meter) for point in at]
    parts += [evaluate(b, values, meter) for b in bounds]
    return _made_up_value(name, parts, values)


def _real_or_noted(meter: Meter, args: list[Any], value: Any) -> Any:
    meter.left_the_reals |= mpmath.im(value) != 0 and not any(mpmath.im(arg) for arg in args)
    return value


def _made_up(key: str) -> Any:
    """A reproducible irrational-looking number for a name, the same in every process and at every precision."""
    generator = random.Random(zlib.crc32(key.encode()))
    return mpmath.mpf(generator.randrange(10**12, 10**13)) / (10**12 + generator.randrange(10**6)) + mpmath.mpf(1) / 7


def _made_up_value(name: str, args: list[Any], values: Values) -> Any:
    key = values.get(SALT, "") + name + "|" + "|".join(mpmath.nstr(a, 20) for a in args)
    return values.setdefault(key, _made_up(key))


def evaluate(node: Any, values: Values, meter: Meter) -> Any:
    """Value of a parsed tree at the current mpmath precision; symbols are looked up in `values` or made up by name.

    Raises:
        UndecidableError: undefined, too large, too much work, or a kind of node that is not supported.
    """
    meter.charge(8)
    name = type(node).__name__
    if node.is_Symbol:
        return values.setdefault(node.name, _made_up(node.name))
    if node.is_Integer:
        return mpmath.mpf(int(node))
    if node.is_Rational:
        return mpmath.mpf(int(node.p)) / int(node.q)
    if node is sympy.pi:
        return +mpmath.pi
    if node is sympy.E:
        return +mpmath.e
    if isinstance(node, Binder):
        symbol, body, variable, *bounds = node.args
        return _bound(meter, symbol.name, body, variable, bounds, values)
    if not node.args:
        raise UndecidableError(f"{name} is not evaluated")
    args = [evaluate(a, values, meter) for a in node.args]
    meter.charge(len(args) * (mpmath.mp.dps / 500) ** 2)
    if node.is_Add:
        return functools.reduce(lambda a, b: a + b, args)
    if node.is_Mul:
        product = functools.reduce(lambda a, b: a * b, args)
        if magnitude(product) > MAX_MAGNITUDE:
            raise UndecidableError("product too large")
        return product
    if node.is_Pow:
        return _real_or_noted(meter, args, _real_power(meter, args[0], node.exp, args[1]))
    if name == "exp":
        return _exp(meter, args[0])
    if name == "log":
        return _real_or_noted(meter, args, _log(meter, *args))
    if name in ("gcd", "lcm") and all(map(mpmath.isint, args)):
        return mpmath.mpf((math.gcd if name == "gcd" else math.lcm)(*(int(mpmath.re(a)) for a in args)))
    if name in ("factorial", "factorial2", "binomial"):
        return _gamma_like(meter, name, args)
    if name in _ELEMENTARY:
        if magnitude(args[0]) > 1000:
            raise UndecidableError("angle too large")
        _charge_elementary(meter)
        return _real_or_noted(meter, args, _ELEMENTARY[name](*args))
    if name in _PLAIN:
        return _PLAIN[name](*([mpmath.re(a) for a in args] if name in ("Max", "Min", "floor", "ceiling") else args))
    if name in ("bmod", "pmod") and all(map(mpmath.isint, args)) and args[1] > 0:
        args[0] %= args[1]
        return args[0] if name == "bmod" else _made_up_value(name, args, values)
    if isinstance(node, sympy.Function):
        return _made_up_value(name, args, values)
    raise UndecidableError(f"{name} is not supported")
