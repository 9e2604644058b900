r"""A small parser for the LaTeX of answers: arithmetic, powers, roots, fractions, functions, subscripts.

It builds unevaluated SymPy trees in well under a millisecond and in bounded time whatever the text is. What is not read
here raises `UndecidableError`: such a gold is compared as text only, and `t1 curate` reports it.

Conventions: an argument without brackets runs to the next operator or function (sin 2t cos t is sin(2t) cos(t));
a number before a numeric fraction is a mixed number, and before another number nothing; f, g, h before a bracket are
functions, so are letters with primes, capitals before one name and everything before one number (P(0), zeta(3)), other
letters are factors; an odd root of a negative number is the real one, as a power 1/3 too; log without base is decimal;
`i` stays a symbol here; a sum, product or limit takes the next term; an integral runs to its dx; a remainder is that of
all before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy

from megatron_t1.reward.answers.normalize import GREEK
from megatron_t1.reward.answers.tokens import TOKEN, Tokens, UndecidableError, is_number, tokenized
from megatron_t1.reward.answers.trees import Fraction, bind, determinant, negated, quotient

_SYMBOLS = {*GREEK, "ell", "hbar", "aleph", "partial", "arg"}


def _cis(angle: Any, evaluate: bool) -> Any:
    return sympy.exp(sympy.Mul(sympy.Symbol("i"), angle, evaluate=evaluate), evaluate=evaluate)


def _permutations(n: Any, k: Any) -> Any:
    """n (n-1) ... of k factors."""
    return sympy.Mul(sympy.binomial(n, k, evaluate=False), sympy.factorial(k, evaluate=False), evaluate=False)


def _of_sets(extreme: Any, *sets: Any) -> Any:
    """Union or intersection of names: largest and smallest of numbers obey the same laws."""
    if not all(each.is_Symbol or isinstance(each, sympy.Max | sympy.Min) for each in sets):
        raise UndecidableError("a union of what are no names")
    return extreme(*sets, evaluate=False)


_CHOSEN: dict[str, Callable[[Any, Any], Any]] = {
    "C": partial(sympy.binomial, evaluate=False), "A": _permutations, "P": _permutations,
}  # fmt: skip
"""What C(10,3) and C_{10}^3 stand for."""
_FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "sinh": sympy.sinh,
    "arcsinh": sympy.asinh, "arccosh": sympy.acosh, "arctanh": sympy.atanh, "cosh": sympy.cosh,
    "tanh": sympy.tanh, "cis": _cis, "exp": sympy.exp, "ln": sympy.log, "log": sympy.log, "lg": sympy.log,
}  # fmt: skip
_DECORATIONS = {"overline", "overrightarrow", "vec", "hat", "tilde", "angle", "triangle"}
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\{": "\\}"}
_TIMES = {"\\cdot", "\\times"}
_BINDERS = {"sum", "prod", "lim", "int"}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "Bmatrix"}
MAX_DETERMINANT = 4
"""Rows of the largest determinant written out."""
_REMAINDERS = {"\\bmod", "\\pmod"}
_INFIX: dict[str | None, Callable[[Any, Any], Any]] = {
    "\\choose": partial(sympy.binomial, evaluate=False),
    "\\over": quotient,
    "\\cup": partial(_of_sets, sympy.Max),
    "\\cap": partial(_of_sets, sympy.Min),
}
"""Of all that stands before them in their group with all behind them."""
_ENDS = {None, "+", "-", "/", ")", "]", "}", "\\}", ",", "\\rfloor", "\\rceil", *_TIMES, *_REMAINDERS, *_INFIX}
_CHOOSE = re.compile(r"_ (?:\{ )?(\d+) (?:\} )?\^ (?:\{ )?(\d+)(?: \})?(?= |$)")
"""After the C of C_{10}^{4}."""


class _Parser(Tokens):
    in_bars = 0

    def expression(self) -> Any:
        self.deeper()
        terms = [self.signed_term()]
        while self.next in ("+", "-"):
            terms.append(self.signed_term())
        total = terms[0] if len(terms) == 1 else sympy.Add(*terms, evaluate=False)
        while self.next in _REMAINDERS:
            total = sympy.Function(self.take()[1:])(total, self.term())
        self.depth -= 1
        return total

    def group_content(self) -> Any:
        tree = self.expression()
        while self.next in _INFIX:
            tree = _INFIX[self.take()](tree, self.expression())
        return tree

    def signed_term(self) -> Any:
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        term = self.term()
        return negated(term) if negative else term

    def term(self) -> Any:
        factors = [self.factor()]
        while True:
            token = self.next
            if token in _TIMES:
                self.take()
                factors.append(self.signed_factor())
            elif token == "/":
                self.take()
                factors = [quotient(_product(factors), self.signed_factor())]
            elif token in _ENDS or (token == "|" and self.in_bars):
                return _product(factors)
            else:
                if is_number(token) and is_number(self.tokens[self.position - 1]):
                    raise UndecidableError(f"two numbers without a sign between them: {token}")
                start = self.position
                factors.append(self.factor())
                if token == "\\text" and self.next not in _ENDS and self.says_more(start):
                    raise UndecidableError("words between two factors")  # 8 by 11, 5 R 2: they don't commute
                if len(factors) == 2 and factors[0].is_Integer and isinstance(factors[1], Fraction):  # 1 1/2
                    factors = [sympy.Add(*factors, evaluate=False)]

    def says_more(self, start: int) -> bool:
        r"""Whether the \text{} at `start` is more than a letter that stands for a factor."""
        if sum(token.isalpha() for token in self.tokens[start : self.position]) > 1:
            return True
        return is_number(self.tokens[start - 1]) and is_number(self.next)

    def signed_factor(self) -> Any:
        if self.next == "-":
            self.take()
            return negated(self.factor())
        return self.factor()

    def factor(self) -> Any:
        base = self.base()
        while True:
            if self.next == "^":
                self.take()
                if self.next == "\\circ":
                    self.take()
                    base = sympy.Mul(base, sympy.pi, sympy.Rational(1, 180), evaluate=False)
                else:
                    base = sympy.Pow(base, self.argument(), evaluate=False)
            elif self.next in ("_", "'") and base.is_Pow and base.base.is_Symbol:  # x^2_1
                base = sympy.Pow(self.symbol(base.base.name), base.exp, evaluate=False)
            elif self.next == "!":
                self.take()
                double = self.next == "!"
                if double:
                    self.take()
                base = (sympy.factorial2 if double else sympy.factorial)(base, evaluate=False)
            else:
                return base

    def argument(self) -> Any:
        """One braced group, or one token, as after ^ and \\frac."""
        if self.next == "{":
            return self.bracketed()
        token = self.take()
        if re.fullmatch(r"\d{2,}", token):  # x^23 is x^2 3
            self.position -= 1
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
            token = self.take()
        if token.isdecimal():
            return sympy.Integer(token)
        self.position -= 1
        return self.base()

    def bracketed(self) -> Any:
        closing = _BRACKETS[self.take()]
        bars, self.in_bars = self.in_bars, 0
        inner = self.group_content()
        self.expect(closing)
        self.in_bars = bars
        return inner

    def base(self) -> Any:
        token = self.next
        if token in ("(", "[", "{"):
            return self.bracketed()
        if token in ("\\lfloor", "\\lceil"):
            inner = self.bracketed()
            return (sympy.floor if token == "\\lfloor" else sympy.ceiling)(inner, evaluate=False)
        token = self.take()
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            return sympy.Integer(token) if token.isdecimal() else sympy.Rational(token)
        if token == "|":
            return self.absolute()
        if token.startswith("\\"):
            return self.command(token[1:])
        if token.isascii() and token.isalpha():
            return self.letter(token)
        raise UndecidableError(f"{token!r} is not readable as mathematics")

    def absolute(self) -> Any:
        self.in_bars += 1
        inner = self.expression()
        self.expect("|")
        self.in_bars -= 1
        return sympy.Abs(inner, evaluate=False)

    def letter(self, token: str) -> Any:
        if token in "CP" and self.next == "(":
            start, arguments = self.position, self.arguments()
            if len(arguments) == 2 and (token == "C" or all(argument.is_Integer for argument in arguments)):
                return _CHOSEN[token](*arguments)
            self.position = start
        if token in _CHOSEN and (m := _CHOOSE.match(" ".join(self.tokens[self.position : self.position + 8]))):
            n, k = int(m[1]), int(m[2])
            if n >= k and n > 1:
                self.position += len(m[0].split())
                return _CHOSEN[token](sympy.Integer(n), sympy.Integer(k))
        if token in "fghFGH" and self.next == "(":
            return sympy.Function(token)(*self.arguments())
        return sympy.E if token == "e" and self.next != "_" else self.symbol(token)

    def is_application(self, name: str) -> bool:
        """Whether a name before a bracket is a function: f'(x), F(a), P(0), phi(1/2)."""
        inside = self.tokens[self.position + 1 : self.position + 5]
        if self.next != "(" or ")" not in inside or name == "i":
            return False
        inside = inside[: inside.index(")")]
        return "'" in name or all(map(is_number, inside[::2])) or (name[0].isupper() and len(inside) == 1)

    def symbol(self, name: str) -> Any:
        primes = ""
        while self.next in ("_", "'"):
            if self.take() == "'":
                primes += "'"
            else:
                name += "_" + self.name_part()
        name += primes
        if not self.is_application(name):
            return sympy.Symbol(name)
        if name == "Gamma":
            (argument,) = self.arguments()
            return sympy.factorial(sympy.Add(argument, -1, evaluate=False), evaluate=False)
        return sympy.Function(name)(*self.arguments())

    def arguments(self) -> list[Any]:
        closing = _BRACKETS[self.take()]
        arguments = [self.expression()]
        while self.next == ",":
            self.take()
            arguments.append(self.expression())
        self.expect(closing)
        return arguments

    def command(self, name: str) -> Any:
        if name == "pi":
            return sympy.pi
        if name in _SYMBOLS:
            return self.symbol(name)
        if name == "frac":
            return quotient(self.argument(), self.argument())
        if name == "sqrt":
            degree: Any = sympy.Integer(2)
            if self.next == "[":
                degree = self.bracketed()
            return sympy.Pow(self.argument(), quotient(sympy.Integer(1), degree), evaluate=False)
        if name == "binom":
            return sympy.binomial(self.argument(), self.argument(), evaluate=False)
        if name in _FUNCTIONS:
            return self.function(name)
        if name in ("max", "min", "gcd", "lcm") and self.next in ("(", "\\{"):
            arguments = self.arguments()
            extremes = {"max": sympy.Max, "min": sympy.Min}
            return extremes[name](*arguments, evaluate=False) if name in extremes else sympy.Function(name)(*arguments)
        if name in _BINDERS:
            return self.integral() if name == "int" else self.binder(name)
        if name in ("infty", "ldots"):
            return sympy.Symbol(f"\\{name}")
        if name == "det":
            return self.matrix_value(_MATRICES)
        if name == "begin":
            self.position -= 1
            return self.matrix_value({"vmatrix"})
        if name in _DECORATIONS:
            return self.symbol(f"{name} {self.name_part()}")
        if name == "text":
            return self.symbol(self.name_part().strip())
        raise UndecidableError(f"\\{name} is not known")

    def function(self, name: str) -> Any:
        function = _FUNCTIONS[name]
        base = sympy.Integer(10) if name in ("log", "lg") else None
        power = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                power = self.argument()
            else:
                base = self.argument()
        if power == -1 and f"arc{name}" in _FUNCTIONS:
            function, power = _FUNCTIONS[f"arc{name}"], None
        if self.next in ("(", "["):
            argument = self.bracketed()
        else:
            whole = self.next in ("{", "|")
            start = self.position
            argument = self.factor()
            whole &= "^" not in self.tokens[start : self.position] or self.tokens[self.position - 1] != "}"
            while (
                not whole
                and self.next not in _ENDS
                and not (self.next == "|" and self.in_bars)
                and not self._starts_function()
            ):
                argument = sympy.Mul(argument, self.factor(), evaluate=False)
        value = function(argument, evaluate=False)
        if base is not None and name in ("log", "lg"):
            value = quotient(value, sympy.log(base, evaluate=False))
        return value if power is None else sympy.Pow(value, power, evaluate=False)

    def part(self, tokens: list[str]) -> Any:
        """The expression that `tokens` are, read within this one's depth."""
        parser = _Parser(tokens)
        parser.depth = self.depth + 1
        return parser.whole()

    def whole(self) -> Any:
        tree = self.group_content()
        if self.next is not None:
            raise UndecidableError(f"{self.next!r} is unexpected")
        return tree

    def binder(self, name: str) -> Any:
        below, above = self.bounds()
        sign = "\\to" if name == "lim" else "="
        if len(below) < 3 or below[1] != sign or not re.fullmatch(r"[A-Za-z]|\\[a-z]+", below[0]):
            raise UndecidableError(f"\\{name} without {sign} below it")
        variable, point = sympy.Symbol(below[0].lstrip("\\")), below[2:]
        if one_sided := re.search(r"\^ (?:\{ )?([+-])(?: \})?$", " ".join(point)):
            name, point = name + one_sided[1], TOKEN.findall(" ".join(point)[: one_sided.start()])
        limits = [self.part(point)]
        if sign == "=":
            limits.append(self.part(above))
        self.deeper()
        body = self.term()
        self.depth -= 1
        return bind(name, body, variable, limits)

    def integral(self) -> Any:
        limits = [self.part(tokens) for tokens in self.bounds() if tokens]
        start, level = self.position, 0
        while level or self.next != "d":
            token = self.take()
            level += (token in _BRACKETS) - (token in _BRACKETS.values())
        body = self.part(self.tokens[start : self.position] or ["1"])
        self.take()
        return bind("int", body, sympy.Symbol(self.take().lstrip("\\")), limits)

    def matrix_value(self, kinds: set[str]) -> Any:
        r"""Of \begin{vmatrix} ... \end{vmatrix}, or of a matrix after \det, written out."""
        self.expect("\\begin")
        kind = self.name_part()
        end = next((i for i in range(self.position, len(self.tokens)) if self.tokens[i] == "\\end"), None)
        if kind not in kinds or end is None:
            raise UndecidableError(f"{kind} is not a value")
        inside, self.position = self.tokens[self.position : end], end + 1
        self.name_part()
        rows: list[list[list[str]]] = [[[]]]
        for token in inside:
            if token == "\\\\":
                rows.append([[]])
            elif token == "&":
                rows[-1].append([])
            else:
                rows[-1][-1].append(token)
        rows = [row for row in rows if row != [[]]]
        if not 1 <= len(rows) <= MAX_DETERMINANT or any(len(row) != len(rows) for row in rows):
            raise UndecidableError("not a small square of cells")
        return determinant([[self.part(cell) for cell in row] for row in rows])

    def _starts_function(self) -> bool:
        return self.next is not None and self.next[1:] in _FUNCTIONS and self.next[0] == "\\"


def _product(factors: list[Any]) -> Any:
    return factors[0] if len(factors) == 1 else sympy.Mul(*factors, evaluate=False)


def parse_latex(latex: str) -> Any:
    """Unevaluated SymPy tree of a normalised LaTeX expression.

    Raises:
        UndecidableError: not in the grammar above, too long or too deep.
    """
    return _Parser(tokenized(latex)).whole()
