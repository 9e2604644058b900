r"""Texts of relations: their sides, the names of values, and regions of the line as bounds.

Helpers that take a text apart give None, or nothing, for a text that is not of their kind.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

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

MAX_WHOLE_NUMBERS = 64
"""Longest run of whole numbers written out."""
MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
"""Operators between exchanged sides."""
SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))"
SYMBOL = rf"(?:\\Delta\s*)?(?:[A-Za-z]|\\(?:{'|'.join(GREEK)}|ell)(?![a-zA-Z])\s*){SUBSCRIPT}?'*"
_ONE_SET = rf"\(?\s*(?:(?:\\complement|C)\s*{SUBSCRIPT}\s*)?[A-Z]\s*\)?"
_NAME = re.compile(
    rf"{SYMBOL}\s*(?:\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})*\s*\))?"  # x, a_1, f(x)
    rf"|{SYMBOL}\s*\^\{{-1\}}\s*\(\s*{SYMBOL}\s*\)"  # f^{-1}(x)
    rf"|\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})+\s*\)"  # (x, y)
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|hat))?\s*\{?[A-Z]{1,4}\}?"  # AB, \angle ABC
    rf"|\|\s*\{{?[A-Z]{{1,3}}\}}?\s*\||[A-Za-z]+{SUBSCRIPT}?(?:\s*:\s*[A-Za-z]+{SUBSCRIPT}?)+"  # |AB|, A:B
    r"|(?:[A-Z]|\\Pr|\\mathbb\{[EP]\})\s*[(\[](?=[^()\[\]]*[A-Za-z])[^()\[\]]+[)\]]"  # P(X = 2)
    r"|(?:\\text\{[^{}0-9]*\}|\\det|\\max|\\min)\s*(?:[A-Za-z]|\((?=[^()]*[A-Za-z])[^()]*\))?"  # words, rank(A)
    rf"|{_ONE_SET}(?:\s*\\(?:cup|cap|setminus)\s*{_ONE_SET})+|(?:\\complement|C)\s*{SUBSCRIPT}\s*[A-Z]"  # A \cap B
    r"|[A-Z]\^\{(?:-1|T)\}|[A-Z]?[a-z]{3,}(?:\s+[a-z]+)*|[\u4e00-\u9fff]{1,12}"
)
_BARS = re.compile(r"\|\s*([a-z])\s*([+-]\s*[\d./]+)?\s*\|")
_Bounds = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""
_Bounded = tuple[list[_Bounds], str]
"""Intervals, and whose values they are; '' when that isn't said."""


def split_relation(s: str) -> tuple[list[str], list[str]]:
    """(sides, operators) of a relation; no operators when it is none."""
    sides, operators = split_at(s, OPERATOR)
    if len(operators) > 1 and set(operators) <= {">", "\\ge"}:
        return sides[::-1], [MIRRORED[o] for o in reversed(operators)]
    return sides, ["\\approx" if o in ("\\sim", "\\simeq") else o for o in operators]


def is_name(s: str) -> bool:
    """Whether a text names a value: x, f(x), AB, "the area"."""
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi") and not NEGATION.search(s)


_DERIVATIVE = re.compile(
    r"\\frac\{(d|\\partial)\s*([a-zA-Z])\}\{\1\s*([a-zA-Z])\}|(d|\\partial)\s*([a-zA-Z])\s*/\s*\4\s*([a-zA-Z])"
)


def symbol_of(side: str) -> str:
    r"""The symbol that longer names stand for, p_{H} of pH and y' of \frac{dy}{dx}; other sides as they are."""
    bare = re.sub(r"\\text\{([^{}]*)\}|[{}\s]", r"\1", side)
    if re.fullmatch(r"p(?:OH|H|K(?:_?[abw])?)", bare):
        return f"p_{{{bare[1:].replace('_', '')}}}"
    if not (m := _DERIVATIVE.fullmatch(side.strip())):
        return side
    _, of, by = (group for group in m.groups() if group)
    return f"{of}_{{{by}}}" if "partial" in side else f"{of}'" if by in "xt" else f"{of}_{{{by}}}'"


def bounds_of_region(s: str) -> _Bounded | None:
    """A union of intervals, written as intervals, inequalities or a set of x with a condition; and whose values."""
    if s == "\\mathbb{R}":
        return [*_LINE], ""
    sides, operators = split_relation(s)
    if operators == ["\\in"] and is_name(sides[0]):
        return _joined([bounds_of_region(sides[1])], sides[0])
    pieces = split_at(s, CUP)[0]
    if len(pieces) > 1:  # [1, 2] \cup {5}
        points = [[(point, True, point, True) for point in set_items(piece) or ()] for piece in pieces]
        return _joined([(p, "") if p else bounds_of_region(piece) for p, piece in zip(points, pieces, strict=True)])
    if m := _SET_BUILDER.fullmatch(s):
        (name, *_), _ = split_relation(m[1])
        return None if _WHOLE_NUMBERS.search(m[1]) else _joined([bounds_of_region(m[2].strip())], name)
    if s.endswith("}") and (m := re.fullmatch(r"(.*\S)\s*(?:\\setminus|-)\s*(\\\{.*\\\})", s, re.S)):
        return _without(bounds_of_region(m[1]), set_items(m[2]) or [])
    if not operators and "\\infty" in s and len(pieces := split_top(s, ",;")) > 1:  # (-\infty,1), (3,\infty)
        region = _joined([bounds_of_region(piece) for piece in pieces])
        return region if region and _are_apart(region[0]) else None
    excluded: list[str] = []
    named = ""
    found: list[_Bounded | None] = []
    for piece in split_top(s, ",;") if operators else [s]:
        sides, operators = split_relation(piece)
        if operators == ["\\ne"] and is_name(sides[0]):
            named, excluded = sides[0], [*excluded, *list_items(sides[1])]
        elif named and not operators:  # x \ne 1, 2
            excluded += list_items(piece)
        elif (
            operators == ["="] and is_name(sides[0]) and "\\lor" in s and INEQUALITY.search(s.replace(piece, ""))
        ):  # x < 1 or x = 5
            found.append(([(sides[1], True, sides[1], True)], sides[0]))
        else:
            found.append(_bounds_of_interval(piece))
    if named and "\\lor" in s:
        return None
    region = _joined(found, named) if found or not named else ([*_LINE], named)
    if region and len(found) > 1 and "\\lor" not in s:
        common = _intersection(region[0], "\\land" in s)
        region = (common, region[1]) if common else None
    return _without(region, excluded) if excluded else region


INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_SET_BUILDER = re.compile(r"\\\{([^|:{}]*(?:\{[^{}]*\}[^|:{}]*)?)[|:](.*)\\\}", re.S)
_WHOLE_NUMBERS = re.compile(r"\\in\s*(?:\\mathbb)?\s*\{?[ZN]")
_LINE: list[_Bounds] = [("-\\infty", False, "\\infty", False)]


def _joined(regions: list[_Bounded | None], variable: str = "") -> _Bounded | None:
    """All of them, when they are regions of one variable."""
    bounds: list[_Bounds] = []
    for region in regions:
        if region is None or (variable and region[1] and compact(region[1]) != compact(variable)):
            return None
        bounds, variable = bounds + region[0], region[1] or variable
    return bounds, variable


def _without(region: _Bounded | None, values: list[str]) -> _Bounded | None:
    """A region but for some points; None when it is unclear where they lie."""
    if region is None or not values:
        return None
    bounds, variable = region
    for value in values:
        at = _position(value)
        if bounds == _LINE:
            bounds = [("-\\infty", False, value, False), (value, False, "\\infty", False)]
            continue
        left = []
        for low, low_in, high, high_in in bounds:
            ends = _position(low), _position(high)
            if at is None or None in ends:
                return None
            if low == value or high == value or not ends[0] < at < ends[1]:
                left.append((low, low_in and low != value, high, high_in and high != value))
            else:
                left += [(low, low_in, value, False), (value, False, high, high_in)]
        bounds = left
    return bounds, variable


def _position(end: str) -> Any:
    if end in ("\\infty", "-\\infty"):
        return math.inf if end == "\\infty" else -math.inf
    number = exact_number(end)
    return number and number.value


def whole_numbers(s: str) -> list[str] | None:
    r"""Members of \{x \in \mathbb{Z} \mid -2 \le x \le 2\}; None of everything else, and when they are too many."""
    m = _SET_BUILDER.fullmatch(s)
    found = bounds_of_region(m[2].strip()) if m and _WHOLE_NUMBERS.search(m[1]) else None
    if not found or len(found[0]) != 1:
        return None
    low_text, low_in, high_text, high_in = found[0][0]
    low, high = _position(low_text), _position(high_text)
    if low is None or high is None or not high - low < MAX_WHOLE_NUMBERS or ("Z" not in str(m and m[1]) and low < 1):
        return None
    return [
        str(n)
        for n in range(math.ceil(low), math.floor(high) + 1)
        if low < n < high or (n == low and low_in) or (n == high and high_in)
    ]


def _intersection(bounds: list[_Bounds], certainly: bool) -> list[_Bounds] | None:
    r"""Of "x > 1 and x < 4", one interval; "x > 1, x < 4" is one too, and "x < 1, x > 4" are two. None when it is said
    of intervals that have nothing in common."""
    rays = sorted(bounds, key=lambda ends: ends[0] == "-\\infty")
    if len(rays) != 2 or rays[0][2] != "\\infty" or rays[1][0] != "-\\infty":
        return _common(bounds) if certainly else bounds
    low, high = exact_number(rays[0][0]), exact_number(rays[1][2])
    if not certainly and (low is None or high is None or low.value > high.value):
        return bounds
    return [(rays[0][0], rays[0][1], rays[1][2], rays[1][3])]


def _are_apart(bounds: list[_Bounds]) -> bool:
    """Whether each begins where the one before has ended: a domain and a range are no union."""
    ends = [(_position(low), _position(high)) for low, _, high, _ in bounds]
    return all(None not in (high, low) and high <= low for (_, high), (low, _) in itertools.pairwise(ends))


def _common(bounds: list[_Bounds]) -> list[_Bounds] | None:
    """What all of them have in common; None when that is nothing, or unclear."""
    placed = [(_position(low), not low_in, _position(high), high_in) for low, low_in, high, high_in in bounds]
    if any(None in place for place in placed):
        return None
    first = max(range(len(bounds)), key=lambda i: placed[i][:2])
    last = min(range(len(bounds)), key=lambda i: placed[i][2:])
    closed = bounds[first][1] and bounds[last][3]
    if placed[first][0] > placed[last][2] or (placed[first][0] == placed[last][2] and not closed):
        return None
    return [(*bounds[first][:2], *bounds[last][2:])]


def _bounds_of_interval(s: str) -> _Bounded | None:
    """The intervals of one piece, and whose values they are."""
    if len(pair := bracketed_items(s)) == 2:
        return [(pair[0], s[0] == "[", pair[1], s[-1] == "]")], ""
    sides, operators = split_relation(s)
    if operators in ([">"], ["\\ge"]):
        sides, operators = sides[::-1], [MIRRORED[operators[0]]]
    closed = [o == "\\le" for o in operators]
    if len(operators) == 1 and (_BARS.fullmatch(sides[0]) or (is_name(sides[0]) and not _BARS.fullmatch(sides[1]))):
        sides, closed = ["-\\infty", *sides], [False, *closed]
    elif len(operators) == 1:
        sides, closed = [*sides, "\\infty"], [*closed, False]
    if len(sides) != 3 or not set(operators) <= {"<", "\\le"}:
        return None
    (low, middle, high), (low_in, high_in) = sides, closed
    if not (m := _BARS.fullmatch(middle)):
        return ([(low, low_in, high, high_in)], middle) if is_name(middle) else None
    top, bottom = _shifted(high, m[2]), _shifted(high, m[2], "-")
    if low == "-\\infty":
        return [(bottom, high_in, top, high_in)], m[1]
    below, above = (bottom, high_in, _shifted(low, m[2], "-"), low_in), (_shifted(low, m[2]), low_in, top, high_in)
    return [below, above], m[1]


def _shifted(bound: str, offset: str | None, sign: str = "") -> str:
    if bound == "\\infty":
        return sign + bound
    bound = f"-({bound})" if sign else bound
    return f"{bound}-({offset})" if offset else bound
