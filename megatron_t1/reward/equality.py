r"""Whether an answer says the same as the gold: lists, sets, tuples, intervals, matrices and relations are taken apart
here, their leaves go to leaves.py, and expressions to symbolic.py.

`equal_cheaply` decides what strings and exact numbers can decide; `equal` decides everything and must run where it can
be killed. Strict in the direction that pays: a longer list, another bracket, another variable, a relation that does not
hold, a hedge are wrong.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_t1.reward.brackets import closing, split_at, split_top, unwrap
from megatron_t1.reward.latex import UndecidableError
from megatron_t1.reward.leaves import NEGATION, check_readable_leaf, is_text, leaves_equal, numbers_equal, words
from megatron_t1.reward.normalize import compact, exact_number

MAX_ITEMS = 64
"""Longest list compared item by item."""

T = TypeVar("T")
_OPERATOR = re.compile(r"\\(?:le|ge|ne|approx|in|equiv|simeq|sim|notin|subset|to|Rightarrow)(?![a-zA-Z])|[<>=]")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
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
_TRAILING_CLAUSE = re.compile(
    r"(?:[,(]\s*|\s+)[a-zA-Z]\s*\\in\s*\\mathbb\{?[ZNRQ]\}?(?:[_^+*{}>0\s]*)\)?$"
    r"|,?\s*(?:\\text\{[\s,(]*(?:for (?:all|any|every|each)|where)\b[^{}]*\}"
    r"|(?<![a-z])for (?:all|any|every|each)\b).*$",
    re.S,
)
_NEGATIVE = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
Interval = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""


def _operators(s: str) -> tuple[list[str], list[str]]:
    sides, found = split_at(s, _OPERATOR)
    return sides, ["\\approx" if o in ("\\sim", "\\simeq") else o for o in found]


def _is_name(s: str) -> bool:
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi") and not NEGATION.search(s)


def _same_items(gold: Sequence[T], answer: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Every gold item has its own partner in the answer, in any order."""
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    left = list(answer)
    for item in gold:
        hit = next((i for i, candidate in enumerate(left) if _surely(same, item, candidate)), None)
        if hit is None:
            return False
        left.pop(hit)
    return True


def _surely(same: Callable[[T, T], bool], gold: T, answer: T) -> bool:
    try:
        return same(gold, answer)
    except UndecidableError:  # this pair is no match; another one may be
        return False


def _same_sequence(gold: Sequence[str], answer: Sequence[str]) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    return all(_item(g, a) for g, a in zip(gold, answer, strict=True))


# --- intervals and regions -------------------------------------------------------------------------------------------


def _interval_of_relation(s: str) -> Interval | None:
    sides, operators = _operators(s)
    if not operators or any(o not in _NEGATIVE for o in operators):
        return None
    if len(operators) == 1:
        left, right, operator = sides[0], sides[1], operators[0]
        if re.fullmatch(r"\|\s*[a-z]\s*\|", left) and operator in ("<", "\\le"):
            return f"-({right})", operator == "\\le", right, operator == "\\le"
        if not _is_name(left):
            left, right, operator = right, left, _NEGATIVE[operator]
        if not _is_name(left):
            return None
        closed = operator in ("\\le", "\\ge")
        return ("-\\infty", False, right, closed) if operator in ("<", "\\le") else (right, closed, "\\infty", False)
    if len(operators) == 2 and _is_name(sides[1]):
        first, second = operators
        if {first, second} <= {"<", "\\le"}:
            return sides[0], first == "\\le", sides[2], second == "\\le"
        if {first, second} <= {">", "\\ge"}:
            return sides[2], second == "\\ge", sides[0], first == "\\ge"
    return None


def _interval(s: str) -> Interval | None:
    if (pair := _tuple(s)) and len(pair[2]) == 2:
        return pair[2][0], pair[0] == "[", pair[2][1], pair[1] == "]"
    return _interval_of_relation(s)


def _excluded(s: str) -> list[str]:
    r"""Values, rising, that "x \ne 1, x \ne 2" or "\mathbb{R} \setminus \{1, 2\}" leave out; [] when unclear."""
    if m := re.fullmatch(r"(?:\\mathbb\{R\}|\(-\\infty,\s*\\infty\))\s*(?:\\setminus|-)\s*(\\\{.*\\\})", s, re.S):
        values = _set(m[1]) or []
    else:
        values, named = [], False
        for piece in split_top(s, ",;"):
            sides, operators = _operators(piece)
            if operators == ["\\ne"] and _is_name(sides[0]):
                named = True
            elif operators or not named:
                return []
            values += _list(sides[-1])
    numbers = [(exact_number(value), value) for value in values]
    if len(values) > 1 and any(number is None for number, _ in numbers):
        return []
    return [value for _, value in sorted(numbers, key=lambda pair: pair[0].value if pair[0] else 0)]


def _region(s: str) -> list[Interval] | None:
    """A union of intervals, written as intervals, inequalities or a set of x with a condition; None when it is not."""
    sides, operators = _operators(s)
    if operators == ["\\in"] and _is_name(sides[0]):
        s = sides[1]
    if m := re.fullmatch(r"\\\{([^|:]*)[|:](.*)\\\}", s, re.S):
        s = m[2].strip()
    if excluded := _excluded(s):
        bounds = ["-\\infty", *excluded, "\\infty"]
        return [(low, False, high, False) for low, high in itertools.pairwise(bounds)]
    pieces = split_at(s, _CUP)[0]
    if len(pieces) == 1:
        pieces = split_top(s, ",;") if operators or _operators(s)[1] else [s]
    intervals = [_interval(p) for p in pieces]
    found = [i for i in intervals if i is not None]
    return found if len(found) == len(intervals) else None


def _intervals_equal(gold: Interval, answer: Interval) -> bool:
    return (gold[1], gold[3]) == (answer[1], answer[3]) and _item(gold[0], answer[0]) and _item(gold[2], answer[2])


# --- brackets --------------------------------------------------------------------------------------------------------


def _tuple(s: str) -> tuple[str, str, list[str]] | None:
    """(opening, closing, items) of a bracket with two items or more."""
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",;")
        if len(items) >= 2:
            return s[0], s[-1], items
    return None


def _set(s: str) -> list[str] | None:
    m = re.fullmatch(r"\\\{(.*)\\\}", s, re.S)
    if not m or closing(s[1:]) != len(s) - 2 or "|" in m[1]:
        return None
    return _list(m[1])


def _matrix(s: str) -> list[list[str]] | None:
    if s[:1] == "[" and s[-1:] == "]" and "\\begin" in s:  # [ array ]
        s = s[1:-1].strip()
    m = re.fullmatch(r"\\begin\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{[a-zA-Z]+\}", s, re.S)
    if not m:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[1]) if row.strip()]
    return rows if sum(map(len, rows)) <= MAX_ITEMS else None


def _nested(s: str) -> list[list[str]] | None:
    """[[1, 2], [3, 4]]."""
    outer = _tuple(s)
    rows = [_tuple(row) for row in outer[2]] if outer and outer[0] == "[" else []
    return [row[2] for row in rows if row] if rows and all(row and row[0] == "[" for row in rows) else None


def _column(s: str) -> list[list[str]] | None:
    vector = _tuple(s)
    return [[item] for item in vector[2]] if vector else None


def _matrices_equal(gold: str, answer: str) -> bool:
    """Of matrices of one shape; a column may be written as a tuple, a matrix as a list of rows."""
    g, a = (_matrix(s) or _nested(s) or _column(s) for s in (gold, answer))
    if not g or not a or [len(row) for row in g] != [len(row) for row in a]:
        return False
    return _same_sequence(list(itertools.chain(*g)), list(itertools.chain(*a)))


def _list(s: str) -> list[str]:
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


def _once(items: list[str]) -> list[str]:
    return list({compact(item): item for item in items}.values())


# --- relations -------------------------------------------------------------------------------------------------------


def _named(s: str) -> tuple[str, str]:
    r"""(name, value) of "x = 5", "x = y = 5", "f(x) = ...", "x \in S"; name '' when there is none."""
    sides, operators = _operators(s)
    if operators == ["\\in"] and _is_name(sides[0]) and not sides[1].startswith("\\mathbb"):
        return sides[0], sides[1]
    if not operators or not set(operators) <= {"=", "\\approx"} or not _is_name(sides[0]):
        return "", s
    values = list(itertools.dropwhile(_is_name, sides[:-1])) + sides[-1:]
    joined = values[0]
    for operator, side in zip(operators[len(sides) - len(values) :], values[1:], strict=True):
        joined += f" {operator} {side}"
    return sides[0], joined


def _names_clash(gold: str, answer: str) -> bool:
    """Two plain variables with different names; functions may name themselves and their argument as they like."""
    single = re.compile(_SYMBOL)
    g, a = compact(gold), compact(answer)
    return bool(single.fullmatch(g) and single.fullmatch(a)) and g != a


def _variable(s: str) -> str:
    """The one variable that a relation is about; '' when there is none."""
    sides, operators = _operators(s)
    names = [side for side in sides if operators and _is_name(side)]
    return names[0] if len(names) == 1 else ""


def _with_argument_x(name: str, value: str) -> str:
    """The value of f(t) = ... with its argument called x."""
    argument = _FUNCTION_NAME.fullmatch(name)
    return re.sub(rf"(?<![a-zA-Z\\]){argument[1]}(?![a-zA-Z])", "x", value) if argument else value


def _relations_equal(gold: str, answer: str) -> bool:
    """When at least one side is a relation."""
    from megatron_t1.reward import symbolic  # heavy, and only allowed inside a worker

    g_sides, g_ops = _operators(gold)
    a_sides, a_ops = _operators(answer)
    if g_ops[-1:] == ["\\approx"] and not (len(g_ops) == 1 and _is_name(g_sides[0])):
        return _item(gold[: gold.rindex("\\approx")].strip(), answer) or (not a_ops and _item(g_sides[-1], answer))
    if a_ops[-1:] == ["\\approx"] and not (len(a_ops) == 1 and _is_name(a_sides[0])):
        return _item(gold, re.split(r"\\(?:approx|sim|simeq)(?![a-zA-Z])", answer)[0].strip())
    g_name, g_value = _named(gold)
    a_name, a_value = _named(answer)
    if g_name and a_name:
        if _names_clash(g_name, a_name):
            return False
        return _item(_with_argument_x(g_name, g_value), _with_argument_x(a_name, a_value))
    if a_name and not g_ops:
        return _item(gold, a_value)
    if g_name and not a_ops:
        return _item(g_value, answer)
    if not g_ops:  # an equation where a value was asked: all its sides must be that value, or leave it open
        if not set(a_ops) <= {"=", "\\approx"} or not _item(gold, a_sides[-1]):
            return False
        return all(_item(gold, side) or (compact(gold) != "0" and symbolic.is_open(side)) for side in a_sides[:-1])
    if g_ops == ["="] and (not a_ops or a_name):
        return symbolic.solves(g_sides[0], g_sides[1], compact(a_name), a_value)
    comparable = {*_NEGATIVE, "=", "\\ne"}
    if len(g_ops) == len(a_ops) == 1 and g_ops[0] in comparable and a_ops[0] in comparable:
        return symbolic.relations_equal((g_sides[0], g_ops[0], g_sides[1]), (a_sides[0], a_ops[0], a_sides[1]))
    return g_ops == a_ops and _same_sequence(g_sides, a_sides)


# --- the whole -------------------------------------------------------------------------------------------------------


def _item(gold: str, answer: str) -> bool:
    """Two single answers (not lists)."""
    gold, answer = unwrap(gold), unwrap(answer)
    cheap = equal_cheaply(gold, answer)
    if cheap is not None:
        return cheap
    if _matrix(gold) or _matrix(answer):
        return _matrices_equal(gold, answer)
    g_tuple, a_tuple = _tuple(gold), _tuple(answer)
    if g_tuple and a_tuple:
        return g_tuple[:2] == a_tuple[:2] and _same_sequence(g_tuple[2], a_tuple[2])
    g_set, a_set = _set(gold), _set(answer)
    if g_set is not None and a_set is not None:
        return _same_items(g_set, a_set, _item)
    if g_set is not None and len(g_set) == 1:
        return _item(g_set[0], answer)
    if a_set is not None and len(a_set) == 1:
        return _item(gold, a_set[0])
    g_region, a_region = _region(gold), _region(answer)
    if g_region and a_region:
        if _names_clash(_variable(gold), _variable(answer)):
            return False
        if _same_items(g_region, a_region, _intervals_equal):
            return True
        if g_tuple or a_tuple or len(g_region) != 1 or len(a_region) != 1:
            return False
    if _operators(gold)[1] or _operators(answer)[1]:
        return _relations_equal(gold, answer)
    if g_tuple or a_tuple or g_region or a_region or g_set is not None or a_set is not None:
        return False
    return leaves_equal(gold, answer)


def _lists(gold: str, answer: str) -> bool:
    """Two answers of which any may be a list."""
    g_items, a_items = _list(gold), _list(answer)
    if len(g_items) == 1 and len(a_items) == 1:
        return _item(gold, answer)
    g_region, a_region = _region(gold), _region(answer)
    if g_region and a_region and (_operators(gold)[1] or _operators(answer)[1] or _CUP.search(gold + answer)):
        return _same_items(g_region, a_region, _intervals_equal)
    if len(g_items) > 1 and len(a_items) > 1:
        return _same_items(g_items, a_items, _item) or _same_items(_once(g_items), _once(a_items), _item)
    single = unwrap(_named(gold if len(g_items) == 1 else answer)[1])
    bracket = _tuple(single)
    if bracket and bracket[:2] == ("(", ")"):  # a tuple against a bare list: in order
        return _same_sequence(bracket[2], a_items) if len(g_items) == 1 else _same_sequence(g_items, bracket[2])
    members = _set(single)
    if members is not None:
        return _same_items(members, a_items, _item) if len(g_items) == 1 else _same_items(g_items, members, _item)
    # "15 39/40, or 639/40": several spellings of the one gold
    return len(g_items) == 1 and len(a_items) <= MAX_ITEMS and all(_item(gold, item) for item in a_items)


def equal_cheaply(gold: str, answer: str) -> bool | None:
    """Verdict of strings and exact numbers on normalised texts; None when only `equal` can tell."""
    if compact(gold) == compact(answer):
        return True
    if not answer:
        return False
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a)
    for comma, point in ((gold, answer), (answer, gold)):  # a decimal comma against a decimal point
        if re.fullmatch(r"-?\d+,\d+", comma) and re.fullmatch(r"-?\d+\.\d+", point):
            return comma.replace(",", ".") == point
    return None


def equal(gold: str, answer: str) -> bool:
    """Verdict on normalised texts. Run it where it can be killed.

    Raises:
        UndecidableError: the mathematics cannot be read or is too large.
    """
    gold, answer = unwrap(_TRAILING_CLAUSE.sub("", gold)), unwrap(_TRAILING_CLAUSE.sub("", answer))
    cheap = equal_cheaply(gold, answer)
    if cheap is not None:
        return cheap
    if is_text(gold.replace(",", " ")):
        return words(gold) == words(answer) != ""
    return _lists(gold, answer)


def check_readable(answer: str) -> None:
    """Whether `equal` can compare this normalised answer with other spellings of it, and not as a string alone.

    Raises:
        UndecidableError: some part of it is no number, short text or expression; the message names the part.
    """
    s = unwrap(_TRAILING_CLAUSE.sub("", answer))
    if exact_number(s) is not None:
        return
    items = _list(s)
    bracket, members, rows = _tuple(s), _set(s), _matrix(s)
    if rows:
        parts = list(itertools.chain(*rows))
    elif bracket:
        parts = bracket[2]
    elif members is not None:
        parts = members
    elif len(items) > 1:
        parts = items
    elif region := _region(s):
        parts = [bound for interval in region for bound in (interval[0], interval[2])]
    elif _operators(s)[1]:
        parts = _operators(s)[0]
    else:
        check_readable_leaf(s)
        return
    for part in parts:
        if part == s:
            raise UndecidableError(f"{part[:60]!r} cannot be read")
        check_readable(part)
