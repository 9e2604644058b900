r"""Reads a normalised answer, once, into typed values. Nothing is compared here, and the work is bounded.

What can be read in two ways keeps both: "(1, 2)" is a tuple and an interval, "x > 3" a relation and a region, "1,200" a
number and a list. Whatever is nothing else is an expression, which latex.py reads when it is asked for. Helpers that
take a text apart give None, or nothing, for a text that is not of their kind.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass
from typing import Any

from megatron_t1.reward.answers.brackets import closing, split_at, split_top, unwrap
from megatron_t1.reward.answers.compare_trees import MIRRORED
from megatron_t1.reward.answers.latex import parse_latex
from megatron_t1.reward.answers.matrices import matrix_cells
from megatron_t1.reward.answers.normalize import Exact, compact, exact_number
from megatron_t1.reward.answers.quantities import NEGATION, NO_UNIT, Unit, clock, in_base, is_text, ratio, split_unit
from megatron_t1.reward.answers.trees import rational

MAX_ITEMS = 64
"""Longest list compared item by item."""
MAX_NESTING = 8
"""Deepest structure read: tuples of sets of tuples ..."""

_TRAILING_CLAUSE = re.compile(
    r"(?:[,(]\s*|\s+)[a-zA-Z]\s*\\in\s*\\mathbb\{?[ZNRQ]\}?(?:[_^+*{}>0\s]*)\)?$"
    r"|,?\s*(?:\\text\{[\s,(]*(?:for (?:all|any|every|each)|where)\b[^{}]*\}"
    r"|(?<![a-z])for (?:all|any|every|each)\b).*$",
    re.S,
)
_HARMLESS_LEAD = re.compile(
    r"^\\text\{\s*(?:only|exactly|about|approximately|total|answer|[a-z ]{0,80}\b(?:is|are|equals))\s*:?\s*\}"
    r"|^(?:the|answer)\b[a-z ]{0,40}(?-i:[A-Z]+ )?[a-z ]{0,40}\b(?:is|are|equals|=)(?=\W)",
    re.I,
)
_REMARK = re.compile(
    r"\s*(?:\\text\{)?\s*\(\s*(?:\\text\{)?\s*(?:about|approximately|approx\.?|roughly|\\approx)(?![a-z])[^()]*\)\s*\}?$",
    re.I,
)
_NAME_IN_CLAUSE = re.compile(r"(?<![A-Za-z\\{])[b-zA-Z](?![A-Za-z])")
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?:for|when|where|if|then|is|the|otherwise|with|such|that|which|of|on|by|has|have|there)(?![a-zA-Z])"
)
_BINDER = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
_OPERATOR = re.compile(r"\\(?:le|ge|ne|approx|in|equiv|simeq|sim|notin|subset|to|Rightarrow)(?![a-zA-Z])|[<>=]")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|"
    "Delta|Omega|ell|Gamma|Phi"
)
_SUB = r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))"
SYMBOL = rf"(?:\\Delta\s*)?(?:[A-Za-z]|\\(?:{_GREEK})(?![a-zA-Z])\s*){_SUB}?'*"
_NAME = re.compile(
    rf"{SYMBOL}\s*(?:\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})*\s*\))?"  # x, a_1, f(x)
    rf"|\(\s*{SYMBOL}(?:\s*,\s*{SYMBOL})+\s*\)"  # (x, y)
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|hat))?\s*\{?[A-Z]{1,4}\}?"  # AB, \angle ABC
    rf"|\|\s*\{{?[A-Z]{{1,3}}\}}?\s*\||[A-Z]{_SUB}?(?:\s*:\s*[A-Z]{_SUB}?)+"  # |AB|, A:B
    r"|\\text\{[^{}0-9]*\}\s*[A-Za-z]?|[A-Z]?[a-z]{3,}(?:\s+[a-z]+)*"  # words
)
_FUNCTION_NAME = re.compile(rf"\s*[A-Za-z]{_SUB}?'*\s*\(\s*([a-zA-Z])\s*\)\s*")
_ARGUMENT = "\\arg "
"""Stands for the argument of a function, whatever it is called."""
_BARS = re.compile(r"\|\s*([a-z])\s*([+-]\s*[\d./]+)?\s*\|")
_Bounds = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""


@dataclass(frozen=True)
class Answer:
    """What every kind of answer has."""

    text: str

    @functools.cached_property
    def key(self) -> str:
        """Equal keys, equal answers."""
        return compact(self.text)

    @functools.cached_property
    def tree(self) -> Any:
        """Its expression.

        Raises:
            UndecidableError: it is none that latex.py knows.
        """
        return parse_latex(self.text)


@dataclass(frozen=True)
class Literal(Answer):
    r"""Equal to its own spelling only: \infty, 1010_2, and what is too long or too deep to be read."""

    problem: str = ""


@dataclass(frozen=True)
class Words(Answer):
    """A text, a name of points, a clock time."""


@dataclass(frozen=True)
class Number(Answer):
    """A plain number, known exactly."""

    exact: Exact

    @functools.cached_property
    def tree(self) -> Any:
        return rational(self.exact.value)


@dataclass(frozen=True)
class Expression(Answer):
    """Mathematics without structure."""


@dataclass(frozen=True)
class Quantity(Answer):
    """A value with its unit; `%` and `deg` are units."""

    value: Number | Expression
    unit: Unit


@dataclass(frozen=True)
class Clock(Answer):
    """A time of the day."""

    seconds: int
    half: str
    """Of the day, "a" or "p"; '' when it isn't said."""


@dataclass(frozen=True)
class Ratio(Answer):
    """a:b:c"""

    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Interval(Answer):
    """A part of the line between two ends."""

    low: Answer
    low_closed: bool
    high: Answer
    high_closed: bool


@dataclass(frozen=True)
class Region(Answer):
    """A union of intervals."""

    intervals: tuple[Interval, ...]
    variable: str
    """Whose values they are; '' when that isn't said."""


@dataclass(frozen=True)
class Set(Answer):
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Tuple(Answer):
    """Two items or more in brackets."""

    opening: str
    closing: str
    items: tuple[Answer, ...]
    region: Region | None
    """Its other reading: an interval."""


@dataclass(frozen=True)
class List(Answer):
    """Items without brackets, or inequalities that are a region together."""

    items: tuple[Answer, ...]
    region: Region | None
    whole: Answer | None
    """Its other reading, with commas for thousands: 1,200 is also 1200."""


@dataclass(frozen=True)
class Matrix(Answer):
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Relation(Answer):
    r"""Sides with operators between them; "x = 5", "x = y = 5", "f(x) = ..." and "x \in S" name a value."""

    sides: tuple[Answer, ...]
    operators: tuple[str, ...]
    name: str
    """'' when it isn't the name of a value."""
    value: Answer | None
    value_of_x: Answer | None
    """The value with its argument renamed: of f(t) = t^2 it is that of f(x) = x^2."""
    region: Region | None


@dataclass(frozen=True)
class Approximation(Answer):
    r"""1/6 \approx 0.167"""

    exact: Answer
    rounded: tuple[Answer, ...]


# --- what the whole is -----------------------------------------------------------------------------------------------


_THOUSANDS = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:,\d{3})+(?!\d)")


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Answer:
    """The answer that a normalised text is. Bounded work, whatever the text is."""
    s = unwrap(_TRAILING_CLAUSE.sub("", text))
    if len(s) < len(text) and (names := _NAME_IN_CLAUSE.findall(text[len(s) :])) and not any(n in s for n in names):
        return Literal(text, "a value with a clause on something else")
    if exact_number(s) is None and is_text(s.replace(",", " ")):
        return Words(s)
    if (remark := _REMARK.search(s)) and not _contradicts(s[: remark.start()], remark[0]):
        s = s[: remark.start()]
    if (lead := _HARMLESS_LEAD.match(s)) and not NEGATION.search(lead[0]):
        s = s[lead.end() :].strip(" :=")
    if _PROSE.search(re.sub(r"\\text\{[^{}]*\}", "", s)):
        return Literal(text, "a sentence")
    items = _list_items(s)
    if len(items) < 2:
        return _item(s, 0)
    if len(items) > MAX_ITEMS:
        return Literal(s, f"a list of {len(items)} items")
    joined = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)
    return List(s, _items(items, 0), _region(s, 0), None if "," in joined else _item(joined, 0))


def _contradicts(value: str, remark: str) -> bool:
    """5 (about 7)"""
    number, said = exact_number(value), re.search(r"\d+(?:\.\d+)?", remark)
    return number is not None and said is not None and abs(float(number.value) - float(said[0])) > 0.5


def _items(texts: list[str], depth: int) -> tuple[Answer, ...]:
    return tuple(_item(text, depth) for text in texts)


@functools.lru_cache(maxsize=4096)  # a text may be a side, a value and a bound
def _item(text: str, depth: int) -> Answer:
    """The answer that a text within `depth` others is; no list."""
    s, depth = unwrap(text), depth + 1
    if (number := exact_number(s)) is not None:
        return Number(s, number)
    if depth > MAX_NESTING:
        return Literal(s, "nested too deep")
    if (cells := matrix_cells(s)) is not None and cells[0][1:] == cells[1:] == []:
        return _item(cells[0][0], depth)
    if cells is not None:
        return Matrix(s, tuple(_items(row, depth) for row in cells))
    bracketed, members = _bracketed_items(s), _set_items(s)
    if len(bracketed) > MAX_ITEMS or len(members or ()) > MAX_ITEMS:
        return Literal(s, "too many items")
    if bracketed:
        return Tuple(s, s[0], s[-1], _items(bracketed, depth), _region(s, depth))
    if members is not None:
        return Set(s, _items(members, depth))
    sides, operators = _split_relation(s)
    if operators:
        return _read_relation(s, sides, operators, depth)
    return _region(s, depth) or _leaf(s)


def _leaf(s: str) -> Answer:
    if "\\infty" in s and not _BINDER.search(s):
        return Literal(s)
    if based := in_base(s):
        return Literal(based)
    if time := clock(s):
        return Clock(s, *time)
    if is_text(s):
        return Words(s)
    if parts := ratio(s):
        return Ratio(s, tuple(plain(part) for part in parts))
    if (split := split_unit(s)) is None:
        return Words(s)
    value = plain(split[0])
    return value if split[1] == NO_UNIT else Quantity(s, value, split[1])


def plain(s: str) -> Number | Expression:
    """A number or an expression, without unit or structure."""
    number = exact_number(s := unwrap(s))
    return Expression(s) if number is None else Number(s, number)


# --- relations and regions -------------------------------------------------------------------------------------------


def _split_relation(s: str) -> tuple[list[str], list[str]]:
    sides, operators = split_at(s, _OPERATOR)
    return sides, ["\\approx" if o in ("\\sim", "\\simeq") else o for o in operators]


def _is_name(s: str) -> bool:
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi") and not NEGATION.search(s)


def _read_relation(s: str, sides: list[str], operators: list[str], depth: int) -> Relation | Approximation:
    if operators == ["="] and _is_name(sides[1]) and not _is_name(sides[0]):  # 5 = x
        sides = sides[::-1]
    named = _is_name(sides[0])
    if operators[-1] == "\\approx" and not (len(operators) == 1 and named):
        exact = re.split(r"\\(?:approx|sim|simeq)(?![a-zA-Z])", s)[0]
        return Approximation(s, _item(exact, depth), _items(sides[operators.index("\\approx") + 1 :], depth))
    text = ""
    if named and operators == ["\\in"] and not sides[1].startswith("\\mathbb"):
        text = sides[1]
    elif named and set(operators) <= {"=", "\\approx"}:
        skipped = len(list(itertools.takewhile(_is_name, sides[:-1])))  # x = y = 5
        text = sides[skipped]
        for operator, side in zip(operators[skipped:], sides[skipped + 1 :], strict=True):
            text += f" {operator} {side}"
    else:
        named = False
    value = value_of_x = _item(text, depth) if named else None
    if named and (argument := _FUNCTION_NAME.fullmatch(sides[0])):
        letters = re.compile(rf"\\text\{{[^{{}}]*\}}|\\[a-zA-Z]+|{argument[1]}")
        value_of_x = _item(letters.sub(lambda m: m[0] if len(m[0]) > 1 else _ARGUMENT, text), depth)
    name = sides[0] if named else ""
    return Relation(s, _items(sides, depth), tuple(operators), name, value, value_of_x, _region(s, depth))


def _region(s: str, depth: int) -> Region | None:
    found = _bounds_of_region(s)
    if found is None or len(found[0]) > MAX_ITEMS:
        return None
    intervals = tuple(
        Interval(f"{'(['[low_in]}{low},{high}{')]'[high_in]}", _item(low, depth), low_in, _item(high, depth), high_in)
        for low, low_in, high, high_in in found[0]
    )
    return Region(s, intervals, found[1])


def _bounds_of_region(s: str) -> tuple[list[_Bounds], str] | None:
    """A union of intervals, written as intervals, inequalities or a set of x with a condition; and whose values."""
    sides, operators = _split_relation(s)
    variable = ""
    if operators == ["\\in"] and _is_name(sides[0]):
        variable, s = sides
    if m := re.fullmatch(r"\\\{([^|:]*)[|:](.*)\\\}", s, re.S):
        variable, s = _split_relation(m[1])[0][0], m[2].strip()
    if excluded := _excluded(s):
        ends = ["-\\infty", *excluded, "\\infty"]
        variable = sides[0] if operators[:1] == ["\\ne"] else variable
        return [(low, False, high, False) for low, high in itertools.pairwise(ends)], variable
    pieces = split_at(s, _CUP)[0]
    listed = len(pieces) == 1 and bool(_split_relation(s)[1])
    if listed:
        pieces = split_top(s, ",;")
    bounds: list[_Bounds] = []
    for piece in pieces:
        if len(pieces) > 1 and (points := _set_items(piece)):  # [1, 2] \cup {5}
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
    if len(pair := _bracketed_items(s)) == 2:
        return [(pair[0], s[0] == "[", pair[1], s[-1] == "]")], ""
    sides, operators = _split_relation(s)
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
        if _is_name(left):
            return [("-\\infty", False, right, closed[0])], left
        return ([(left, closed[0], "\\infty", False)], right) if _is_name(right) else None
    if len(operators) != 2 or not set(operators) <= {"<", "\\le"}:
        return None
    if m := _BARS.fullmatch(sides[1]):
        low, high = sides[0], sides[2]
        below = (_shifted(f"-({high})", m[2]), closed[1], _shifted(f"-({low})", m[2]), closed[0])
        return [below, (_shifted(low, m[2]), closed[0], _shifted(high, m[2]), closed[1])], m[1]
    return ([(sides[0], closed[0], sides[2], closed[1])], sides[1]) if _is_name(sides[1]) else None


def _shifted(bound: str, offset: str | None) -> str:
    return f"{bound}-({offset})" if offset else bound


def _excluded(s: str) -> list[str]:
    r"""Values, rising, that "x \ne 1, x \ne 2" or "\mathbb{R} \setminus \{1, 2\}" leave out; [] when unclear."""
    if m := re.fullmatch(r"(?:\\mathbb\{R\}|\(-\\infty,\s*\\infty\))\s*(?:\\setminus|-)\s*(\\\{.*\\\})", s, re.S):
        values = _set_items(m[1]) or []
    else:
        values, named = [], False
        for piece in split_top(s, ",;"):
            sides, operators = _split_relation(piece)
            if operators == ["\\ne"] and _is_name(sides[0]):
                named = True
            elif operators or not named:
                return []
            values += _list_items(sides[-1])
    numbers = [(exact_number(value), value) for value in values]
    if len(values) > 1 and any(number is None for number, _ in numbers):
        return []
    return [value for _, value in sorted(numbers, key=lambda pair: pair[0].value if pair[0] else 0)]


# --- brackets and lists ----------------------------------------------------------------------------------------------


def _bracketed_items(s: str) -> list[str]:
    """Two items or more in round or square brackets."""
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",;")
        return items if len(items) >= 2 else []
    return []


def _set_items(s: str) -> list[str] | None:
    pieces = split_at(s, _CUP)[0]
    if len(pieces) > 1:
        members = [_set_items(piece) for piece in pieces]
        return None if None in members else list(itertools.chain(*(m for m in members if m)))
    m = re.fullmatch(r"\\\{(.*)\\\}", s, re.S)
    if not m or closing(s[1:]) != len(s) - 2 or "|" in m[1] or (":" in m[1] and _OPERATOR.search(m[1])):
        return None
    return _list_items(m[1])


def _list_items(s: str) -> list[str]:
    r"""Items of a list: split at commas, \pm written out, `p=5,q=2;p=7,q=2` grouped to pairs."""
    items: list[str] = []
    for item in split_top(s, ",;"):
        if "\\{" not in item and 1 <= len(re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", item)) <= 2:
            for plus, minus in (("+", "-"), ("-", "+")):
                upper = re.sub(r"\\pm(?![a-zA-Z])", plus, item)
                items.append(re.sub(r"\\mp(?![a-zA-Z])", minus, upper).lstrip("+ "))
        else:
            items.append(item)
    pairs = [item.split("=", 1) for item in items if item.count("=") == 1]
    names = [name.strip() for name, _ in pairs]
    width = len(set(names))
    if len(pairs) == len(items) > width > 1 and names == names[:width] * (len(items) // width):
        values = [value.strip() for _, value in pairs]
        items = [f"({', '.join(values[i : i + width])})" for i in range(0, len(values), width)]
    return items
