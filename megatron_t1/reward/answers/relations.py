r"""Texts of relations: their sides, the names of values, and regions of the line as bounds.

Helpers that take a text apart give None, or nothing, for a text that is not of their kind.
"""

from __future__ import annotations

import itertools
import re

from megatron_t1.reward.answers.brackets import (
    CUP,
    OPERATOR,
    bracketed_items,
    list_items,
    set_items,
    split_at,
    split_top,
)
from megatron_t1.reward.answers.normalize import GREEK, compact
from megatron_t1.reward.answers.numbers import exact_number
from megatron_t1.reward.answers.words import NEGATION

MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
"""Operators between exchanged sides."""
SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))"
SYMBOL = rf"(?:\\Delta\s*)?(?:[A-Za-z]|\\(?:{'|'.join(GREEK)}|ell)(?![a-zA-Z])\s*){SUBSCRIPT}?'*"
_NAME = re.compile(
    rf"{SYMBOL}\s*(?:\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})*\s*\))?"  # x, a_1, f(x)
    rf"|\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})+\s*\)"  # (x, y)
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|hat))?\s*\{?[A-Z]{1,4}\}?"  # AB, \angle ABC
    rf"|\|\s*\{{?[A-Z]{{1,3}}\}}?\s*\||[A-Z]{SUBSCRIPT}?(?:\s*:\s*[A-Z]{SUBSCRIPT}?)+"  # |AB|, A:B
    r"|(?:[A-Z]|\\Pr|\\mathbb\{[EP]\})\s*[(\[](?=[^()\[\]]*[A-Za-z])[^()\[\]]+[)\]]"  # P(X = 2)
    r"|\\text\{[^{}0-9]*\}\s*[A-Za-z]?|[A-Z]?[a-z]{3,}(?:\s+[a-z]+)*|[\u4e00-\u9fff]{1,12}"  # words
)
_BARS = re.compile(r"\|\s*([a-z])\s*([+-]\s*[\d./]+)?\s*\|")
_Bounds = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""


def split_relation(s: str) -> tuple[list[str], list[str]]:
    """(sides, operators) of a relation; no operators when it is none."""
    sides, operators = split_at(s, OPERATOR)
    return sides, ["\\approx" if o in ("\\sim", "\\simeq") else o for o in operators]


def is_name(s: str) -> bool:
    """Whether a text names a value: x, f(x), AB, "the area"."""
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi") and not NEGATION.search(s)


def bounds_of_region(s: str) -> tuple[list[_Bounds], str] | None:
    """A union of intervals, written as intervals, inequalities or a set of x with a condition; and whose values."""
    sides, operators = split_relation(s)
    variable = ""
    if operators == ["\\in"] and is_name(sides[0]):
        variable, s = sides
    if m := re.fullmatch(r"\\\{([^|:]*)[|:](.*)\\\}", s, re.S):
        variable, s = split_relation(m[1])[0][0], m[2].strip()
    if excluded := _excluded(s):
        ends = ["-\\infty", *excluded, "\\infty"]
        variable = sides[0] if operators[:1] == ["\\ne"] else variable
        return [(low, False, high, False) for low, high in itertools.pairwise(ends)], variable
    pieces = split_at(s, CUP)[0]
    listed = len(pieces) == 1 and bool(split_relation(s)[1])
    if listed:
        pieces = split_top(s, ",;")
    bounds: list[_Bounds] = []
    for piece in pieces:
        if len(pieces) > 1 and (points := set_items(piece)):  # [1, 2] \cup {5}
            bounds += [(point, True, point, True) for point in points]
            continue
        interval = _bounds_of_interval(piece)
        if interval is None or (variable and interval[1] and compact(interval[1]) != compact(variable)):
            return None
        bounds += interval[0]
        variable = interval[1] or variable
    if listed and "\\lor" not in s:
        return _intersection(bounds, "\\land" in s), variable
    return bounds, variable


def _intersection(bounds: list[_Bounds], certainly: bool) -> list[_Bounds]:
    r"""Of "x > 1 and x < 4", one interval; "x > 1, x < 4" is one too, and "x < 1, x > 4" are two."""
    rays = sorted(bounds, key=lambda ends: ends[0] == "-\\infty")
    if len(rays) != 2 or rays[0][2] != "\\infty" or rays[1][0] != "-\\infty":
        return bounds
    low, high = exact_number(rays[0][0]), exact_number(rays[1][2])
    if not certainly and (low is None or high is None or low.value > high.value):
        return bounds
    return [(rays[0][0], rays[0][1], rays[1][2], rays[1][3])]


def _bounds_of_interval(s: str) -> tuple[list[_Bounds], str] | None:
    """The intervals of one piece, and whose values they are."""
    if len(pair := bracketed_items(s)) == 2:
        return [(pair[0], s[0] == "[", pair[1], s[-1] == "]")], ""
    sides, operators = split_relation(s)
    if not operators or any(o not in MIRRORED for o in operators):
        return None
    if operators[0] in (">", "\\ge"):
        sides, operators = sides[::-1], [MIRRORED[o] for o in reversed(operators)]
    closed = [o == "\\le" for o in operators]
    if len(operators) == 1:
        left, right = sides
        if m := _BARS.fullmatch(left):
            return [(_shifted(f"-({right})", m[2]), closed[0], _shifted(right, m[2]), closed[0])], m[1]
        if m := _BARS.fullmatch(right):
            below = ("-\\infty", False, _shifted(f"-({left})", m[2]), closed[0])
            return [below, (_shifted(left, m[2]), closed[0], "\\infty", False)], m[1]
        if is_name(left):
            return [("-\\infty", False, right, closed[0])], left
        return ([(left, closed[0], "\\infty", False)], right) if is_name(right) else None
    if len(operators) != 2 or not set(operators) <= {"<", "\\le"}:
        return None
    if m := _BARS.fullmatch(sides[1]):
        low, high = sides[0], sides[2]
        below = (_shifted(f"-({high})", m[2]), closed[1], _shifted(f"-({low})", m[2]), closed[0])
        return [below, (_shifted(low, m[2]), closed[0], _shifted(high, m[2]), closed[1])], m[1]
    return ([(sides[0], closed[0], sides[2], closed[1])], sides[1]) if is_name(sides[1]) else None


def _shifted(bound: str, offset: str | None) -> str:
    return f"{bound}-({offset})" if offset else bound


def _excluded(s: str) -> list[str]:
    r"""Values, rising, that "x \ne 1, x \ne 2" or "\mathbb{R} \setminus \{1, 2\}" leave out; [] when unclear."""
    if m := re.fullmatch(r"(?:\\mathbb\{R\}|\(-\\infty,\s*\\infty\))\s*(?:\\setminus|-)\s*(\\\{.*\\\})", s, re.S):
        values = set_items(m[1]) or []
    else:
        values, named = [], False
        for piece in split_top(s, ",;"):
            sides, operators = split_relation(piece)
            if operators == ["\\ne"] and is_name(sides[0]):
                named = True
            elif operators or not named:
                return []
            values += list_items(sides[-1])
    numbers = [(exact_number(value), value) for value in values]
    if len(values) > 1 and any(number is None for number, _ in numbers):
        return []
    return [value for _, value in sorted(numbers, key=lambda pair: pair[0].value if pair[0] else 0)]
