r"""Takes a normalised answer apart: its relations, intervals, brackets, matrices and lists. Nothing is compared here.

Every reader gives None, or nothing, for a text that is not of its kind.
"""

from __future__ import annotations

import itertools
import re

from megatron_t1.reward.answers.brackets import closing, split_at, split_top
from megatron_t1.reward.answers.normalize import compact, exact_number
from megatron_t1.reward.answers.quantities import NEGATION

MAX_ITEMS = 64
"""Longest list compared item by item."""

_OPERATOR = re.compile(r"\\(?:le|ge|ne|approx|in|equiv|simeq|sim|notin|subset|to|Rightarrow)(?![a-zA-Z])|[<>=]")
CUP = re.compile(r"\\cup(?![a-zA-Z])")
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|"
    "Delta|Omega|ell|Gamma|Phi"
)
_SUB = r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))"
_SYMBOL = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-zA-Z])\s*){_SUB}?'*"
_NAME = re.compile(
    rf"{_SYMBOL}\s*(?:\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})*\s*\))?"  # x, a_1, f(x)
    rf"|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)"  # (x, y)
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|hat))?\s*\{?[A-Z]{1,4}\}?"  # AB, \angle ABC
    rf"|\|\s*\{{?[A-Z]{{1,3}}\}}?\s*\||[A-Z]{_SUB}?(?:\s*:\s*[A-Z]{_SUB}?)+"  # |AB|, A:B
    r"|\\text\{[^{}0-9]*\}\s*[A-Za-z]?|[A-Z]?[a-z]{3,}(?:\s+[a-z]+)*"  # words
)
_FUNCTION_NAME = re.compile(rf"\s*[A-Za-z]{_SUB}?'*\s*\(\s*([a-zA-Z])\s*\)\s*")
MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
Interval = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""


def split_relation(s: str) -> tuple[list[str], list[str]]:
    sides, found = split_at(s, _OPERATOR)
    return sides, ["\\approx" if o in ("\\sim", "\\simeq") else o for o in found]


def is_name(s: str) -> bool:
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi") and not NEGATION.search(s)


# --- intervals and regions -------------------------------------------------------------------------------------------


def _interval_of_relation(s: str) -> Interval | None:
    sides, operators = split_relation(s)
    if not operators or any(o not in MIRRORED for o in operators):
        return None
    if len(operators) == 1:
        left, right, operator = sides[0], sides[1], operators[0]
        if re.fullmatch(r"\|\s*[a-z]\s*\|", left) and operator in ("<", "\\le"):
            return f"-({right})", operator == "\\le", right, operator == "\\le"
        if not is_name(left):
            left, right, operator = right, left, MIRRORED[operator]
        if not is_name(left):
            return None
        closed = operator in ("\\le", "\\ge")
        return ("-\\infty", False, right, closed) if operator in ("<", "\\le") else (right, closed, "\\infty", False)
    if len(operators) == 2 and is_name(sides[1]):
        first, second = operators
        if {first, second} <= {"<", "\\le"}:
            return sides[0], first == "\\le", sides[2], second == "\\le"
        if {first, second} <= {">", "\\ge"}:
            return sides[2], second == "\\ge", sides[0], first == "\\ge"
    return None


def _interval(s: str) -> Interval | None:
    if (pair := tuple_of(s)) and len(pair[2]) == 2:
        return pair[2][0], pair[0] == "[", pair[2][1], pair[1] == "]"
    return _interval_of_relation(s)


def _excluded(s: str) -> list[str]:
    r"""Values, rising, that "x \ne 1, x \ne 2" or "\mathbb{R} \setminus \{1, 2\}" leave out; [] when unclear."""
    if m := re.fullmatch(r"(?:\\mathbb\{R\}|\(-\\infty,\s*\\infty\))\s*(?:\\setminus|-)\s*(\\\{.*\\\})", s, re.S):
        values = set_of(m[1]) or []
    else:
        values, named = [], False
        for piece in split_top(s, ",;"):
            sides, operators = split_relation(piece)
            if operators == ["\\ne"] and is_name(sides[0]):
                named = True
            elif operators or not named:
                return []
            values += list_of(sides[-1])
    numbers = [(exact_number(value), value) for value in values]
    if len(values) > 1 and any(number is None for number, _ in numbers):
        return []
    return [value for _, value in sorted(numbers, key=lambda pair: pair[0].value if pair[0] else 0)]


def region_of(s: str) -> list[Interval] | None:
    """A union of intervals, written as intervals, inequalities or a set of x with a condition; None when it is not."""
    sides, operators = split_relation(s)
    if operators == ["\\in"] and is_name(sides[0]):
        s = sides[1]
    if m := re.fullmatch(r"\\\{([^|:]*)[|:](.*)\\\}", s, re.S):
        s = m[2].strip()
    if excluded := _excluded(s):
        bounds = ["-\\infty", *excluded, "\\infty"]
        return [(low, False, high, False) for low, high in itertools.pairwise(bounds)]
    pieces = split_at(s, CUP)[0]
    if len(pieces) == 1:
        pieces = split_top(s, ",;") if operators or split_relation(s)[1] else [s]
    elif any(set_of(p) for p in pieces):  # [1, 2] \cup {5}
        points = [[f"[{v},{v}]" for v in set_of(p) or []] or [p] for p in pieces]
        pieces = list(itertools.chain(*points))
    intervals = [_interval(p) for p in pieces]
    found = [i for i in intervals if i is not None]
    return found if len(found) == len(intervals) else None


# --- brackets --------------------------------------------------------------------------------------------------------


def tuple_of(s: str) -> tuple[str, str, list[str]] | None:
    """(opening, closing, items) of a bracket with two items or more."""
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",;")
        if len(items) >= 2:
            return s[0], s[-1], items
    return None


def set_of(s: str) -> list[str] | None:
    pieces = split_at(s, CUP)[0]
    if len(pieces) > 1:
        members = [set_of(piece) for piece in pieces]
        return None if None in members else list(itertools.chain(*(m for m in members if m)))
    m = re.fullmatch(r"\\\{(.*)\\\}", s, re.S)
    if not m or closing(s[1:]) != len(s) - 2 or "|" in m[1]:
        return None
    return list_of(m[1])


def matrix_of(s: str) -> list[list[str]] | None:
    if s[:1] == "[" and s[-1:] == "]" and "\\begin" in s:  # [ array ]
        s = s[1:-1].strip()
    m = re.fullmatch(r"\\begin\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{[a-zA-Z]+\}", s, re.S)
    if not m:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[1]) if row.strip()]
    return rows if sum(map(len, rows)) <= MAX_ITEMS else None


def _nested(s: str) -> list[list[str]] | None:
    """[[1, 2], [3, 4]]."""
    outer = tuple_of(s)
    rows = [tuple_of(row) for row in outer[2]] if outer and outer[0] == "[" else []
    return [row[2] for row in rows if row] if rows and all(row and row[0] == "[" for row in rows) else None


def _column(s: str) -> list[list[str]] | None:
    vector = tuple_of(s)
    return [[item] for item in vector[2]] if vector else None


def rows_of(s: str) -> list[list[str]] | None:
    """Of a matrix; a column may be written as a tuple, a matrix as a list of rows."""
    return matrix_of(s) or _nested(s) or _column(s)


def list_of(s: str) -> list[str]:
    r"""Items of a list: split at commas, \pm written out, `p=5,q=2;p=7,q=2` grouped to pairs."""
    items: list[str] = []
    for item in split_top(s, ",;"):
        if 1 <= len(re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", item)) <= 2:
            for plus, minus in (("+", "-"), ("-", "+")):
                upper = re.sub(r"\\pm(?![a-zA-Z])", plus, item)
                items.append(re.sub(r"\\mp(?![a-zA-Z])", minus, upper).lstrip("+ "))
        else:
            items.append(item)
    pairs = [item.split("=", 1) for item in items if item.count("=") == 1]
    names = list(dict.fromkeys(name.strip() for name, _ in pairs))
    if len(pairs) == len(items) > len(names) > 1 and [n.strip() for n, _ in pairs] == names * (
        len(items) // len(names)
    ):
        values = [value.strip() for _, value in pairs]
        items = [f"({', '.join(values[i : i + len(names)])})" for i in range(0, len(values), len(names))]
    return items


# --- relations -------------------------------------------------------------------------------------------------------


def name_and_value(s: str) -> tuple[str, str]:
    r"""(name, value) of "x = 5", "x = y = 5", "f(x) = ...", "x \in S"; name '' when there is none."""
    sides, operators = split_relation(s)
    if operators == ["\\in"] and is_name(sides[0]) and not sides[1].startswith("\\mathbb"):
        return sides[0], sides[1]
    if not operators or not set(operators) <= {"=", "\\approx"} or not is_name(sides[0]):
        return "", s
    values = list(itertools.dropwhile(is_name, sides[:-1])) + sides[-1:]
    joined = values[0]
    for operator, side in zip(operators[len(sides) - len(values) :], values[1:], strict=True):
        joined += f" {operator} {side}"
    return sides[0], joined


def names_clash(gold: str, answer: str) -> bool:
    """Two plain variables with different names; functions may name themselves and their argument as they like."""
    single = re.compile(_SYMBOL)
    g, a = compact(gold), compact(answer)
    return bool(single.fullmatch(g) and single.fullmatch(a)) and g != a


def variable_of(s: str) -> str:
    """The one variable that a relation is about; '' when there is none."""
    sides, operators = split_relation(s)
    names = [side for side in sides if operators and is_name(side)]
    return names[0] if len(names) == 1 else ""


def with_argument_x(name: str, value: str) -> str:
    """The value of f(t) = ... with its argument called x."""
    argument = _FUNCTION_NAME.fullmatch(name)
    return re.sub(rf"(?<![a-zA-Z\\]){argument[1]}(?![a-zA-Z])", "x", value) if argument else value
