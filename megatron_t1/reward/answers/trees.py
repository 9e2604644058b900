"""The SymPy trees that latex.py builds: unevaluated, so that no text makes SymPy work."""

from __future__ import annotations

import re
from typing import Any

import sympy

INDEX = "index"
"""Stands for the bound variable in a subscript."""


class Binder(sympy.Expr):  # type: ignore[misc]
    """A sum, product, integral or limit: args are its name, its body, its bound variable and its bounds."""

    @property
    def free_symbols(self) -> set[Any]:
        _, body, variable, *bounds = self.args
        return (body.free_symbols - {variable}).union(*(bound.free_symbols for bound in bounds))


def bind(name: str, body: Any, variable: Any, limits: list[Any]) -> Any:
    """A binder; a_i under it becomes a_INDEX, so that the bound variable may have any name."""
    own = re.compile(rf"(?<![A-Za-z]){re.escape(variable.name)}(?![A-Za-z])")
    indexed = {}
    for symbol in body.free_symbols:
        base, _, index = symbol.name.partition("_")
        if index and own.search(index):
            indexed[symbol] = sympy.Symbol(f"{base}_{own.sub(INDEX, index)}")
    return Binder(sympy.Symbol(name), body.xreplace(indexed), variable, *limits)


def determinant(rows: list[list[Any]]) -> Any:
    """Expansion along the first row."""
    if len(rows) == 1:
        return rows[0][0]
    minors = [determinant([row[:j] + row[j + 1 :] for row in rows[1:]]) for j in range(len(rows))]
    signs = [sympy.Integer((-1) ** j) for j in range(len(rows))]
    terms = [sympy.Mul(s, a, m, evaluate=False) for s, a, m in zip(signs, rows[0], minors, strict=True)]
    return sympy.Add(*terms, evaluate=False)


def negated(tree: Any) -> Any:
    return -tree if tree.is_Integer else sympy.Mul(sympy.Integer(-1), tree, evaluate=False)


class Fraction(sympy.Mul):
    """A quotient of two plain integers: after an integer it makes a mixed number."""


def quotient(top: Any, bottom: Any) -> Any:
    kind = Fraction if top.is_Integer and bottom.is_Integer else sympy.Mul
    return kind(top, sympy.Pow(bottom, sympy.Integer(-1), evaluate=False), evaluate=False)


def rational(value: Any) -> Any:
    """The tree of an exact number."""
    return sympy.Rational(value.numerator, value.denominator)
