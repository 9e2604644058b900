r"""Reads a normalised answer, once, into typed values. Nothing is compared here, and the work is bounded.

Whatever is nothing else is an expression, which latex.py reads when it is asked for.
"""

from __future__ import annotations

import functools
import itertools
import re

from megatron_t1.reward.answers.brackets import bracketed_items, in_alphabet, list_items, set_items, unwrap
from megatron_t1.reward.answers.clauses import Clause, parted, without_clause
from megatron_t1.reward.answers.kinds import (
    Answer,
    Approximation,
    Clock,
    Expression,
    Interval,
    List,
    Literal,
    Matrix,
    Number,
    Quantity,
    Ratio,
    Region,
    Relation,
    Set,
    Tuple,
    Words,
)
from megatron_t1.reward.answers.matrices import matrix_cells
from megatron_t1.reward.answers.normalize import ungrouped
from megatron_t1.reward.answers.notations import clock, date, formula, in_base, ratio
from megatron_t1.reward.answers.numbers import Exact, exact_number
from megatron_t1.reward.answers.quantities import NO_UNIT, compound, split_unit
from megatron_t1.reward.answers.relations import (
    SUBSCRIPT,
    SYMBOL,
    bounds_of_region,
    is_name,
    split_relation,
    symbol_of,
    whole_numbers,
)
from megatron_t1.reward.answers.words import NEGATION, OPERATIONS, in_digits, is_prose, is_text

MAX_ITEMS = 64
"""Longest list compared item by item."""
MAX_NESTING = 8
"""Deepest structure read: tuples of sets of tuples ..."""

_NOT_ANOTHER = re.compile(r",\s*(?:\\text\{\s*)?not\b\s*\}?(?:\\[a-z]+|[^a-z\\,]|[a-z](?![a-z]))*$")
"""17, not 18"""
_HARMLESS_LEAD = re.compile(
    r"^\\text\{\s*all\s*\}(?=\s*[a-z]\s*(?:\\[gln]e(?![a-z])|[<>]))"
    r"|^\\text\{\s*(?:only|exactly|about|approximately|total|answer|[a-z ]{0,80}\b(?:is|are|equals)"
    r"|[a-z ]{1,40}(?=:))\s*:?\s*\}"
    r"|^(?:\\text\{\s*)?(?:[A-Za-z]?[\u4e00-\u9fff]{0,20}(?:为|是|等于|:)|一?共有?|约)\s*:?\s*\}?"
    r"|^(?:the|answer)\b[a-z ]{0,40}(?-i:[A-Z]+ )?[a-z ]{0,40}\b(?:is|are|equals|=)(?=\W)",
    re.I,
)
_ANOTHER_LABEL = re.compile(r"[,;]\s*(?:\\land\s*)?(?:\\text\{\s*)?[A-Za-z][A-Za-z ]{0,40}:")
"""Tom: 5, Ann: 7"""
_COPULA = re.compile(r"\b(?:the|is|are|equals?|only|about|approximately)\b|\\text", re.I)
_REMARK = re.compile(
    r"\s*(?:\\text\{)?\s*\(\s*(?:\\text\{)?\s*(?:about|approximately|approx\.?|roughly|\\approx)(?![a-z])([^()]*)\)\s*\}?$",
    re.I,
)
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?:for|when|where|if|then|is|the|otherwise|with|such|that|which|of|on|by|has|have|there)(?![a-zA-Z])"
)
_REMAINDER = re.compile(r"\d+\\text\{ R \}\d+")
_BINDER = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
_POINT = re.compile(rf"([ABDEI-Z]{SUBSCRIPT}?'*)\s*(\(.*\))")  # no C(5,2), no F(x,y)
_TRANSPOSED = re.compile(r"(?<=[)\]}])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\text\{\s*T\s*\})\s*\}?$")
_DECLARED = re.compile(r"(?<![\\a-zA-Z])([a-zA-Z])\s*\\in\s*(?:\\mathbb)?\s*\{?[ZNRQ]")
_LABEL = re.compile(
    r"(?:\\text\{\s*)?([A-Za-z]{2,}(?: [A-Za-z]+){0,2}(?<=\w{3}))(?=[\s:}])\s?:?\s?\}?\s?:?\s?([-(\[\d\\].*)", re.S
)
"""radius: 3, \text{vertex }(2,-3)"""
_FUNCTION_NAME = re.compile(rf"\s*[A-Za-z]{SUBSCRIPT}?'*(?:\^\{{-1\}})?\s*\(\s*([a-zA-Z])\s*\)\s*")
_UNIT_LETTER = re.compile(r"[\d}]\s*\\text\{\s*([A-Z])\s*\}$")
_ARGUMENT = "\\arg "
"""Stands for the argument of a function, whatever it is called."""


def read_both(gold: str, answer: str) -> tuple[Answer, Answer]:
    r"""Gold and answer; a parameter that both declare (k \in \mathbb{Z}) is named as in the gold."""
    if (spelled := formula(gold)) and spelled == formula(answer):
        return read(gold), read(gold)
    (_, said), (value, says) = parted(gold), parted(answer)
    unit = _UNIT_LETTER.search(gold)
    if unit and answer.endswith(unit[1]) and exact_number(answer[:-1]):  # 5V, where the gold has V as a unit
        answer = rf"{answer[:-1]}\text{{{unit[1]}}}"
    g, a = _parameter(gold, said), _parameter(answer, says)
    lone = says if said is None else said if says is None else None
    if lone and (lone.counts or (lone.sign and "\\pmod" in gold + answer)):
        told = "a value whose parameters only one side restricts"
        return Literal(gold, told), Literal(answer, told)
    if said and says and said.clashes(says):
        return read(gold), Literal(answer, "a value whose parameters are of another kind")
    if g and a and g != a and renamed(value, g, "") == value != renamed(value, a, g):
        answer = renamed(value, a, g)
    return read(gold), read(answer)


def _parameter(text: str, clause: Clause | None) -> str:
    """The letter that a text declares, or ''."""
    declared = _DECLARED.search(text)
    return declared[1] if declared else next(iter(clause.names), "") if clause else ""


def renamed(text: str, letter: str, name: str) -> str:
    """With a variable named otherwise."""
    letters = re.compile(rf"\\text\{{[^{{}}]*\}}|\\[a-zA-Z]+|{letter}")
    return letters.sub(lambda m: m[0] if len(m[0]) > 1 else name, text)


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Answer:
    """The answer that a normalised text is. Bounded work, whatever the text is."""
    try:
        value, clause = without_clause(text)
    except ValueError as error:
        return Words(text) if is_text(text.replace(",", " ")) else Literal(text, f"a value with {error}")
    s = in_digits(unwrap(_NOT_ANOTHER.sub("", value)))
    if clause and clause.names and not any(name in s for name in clause.names):
        return Literal(text, "a value with a clause on something else")
    if named := _day_or_time(s):
        return named
    if exact_number(s) is None and is_text(s.replace(",", " ")):
        return Words(s)
    if remark := _REMARK.search(s):
        if _REMARK.search(s[: remark.start()]):
            return Literal(text, "a value with several remarks")
        exact, about = read(s[: remark.start()]), _item(remark[1].replace("\\text{", "").strip(" }"), 0)
        is_checked = isinstance(about, Quantity | Number) and not isinstance(exact, List | Literal | Words)
        return Approximation(s, exact, (about,)) if is_checked else exact
    lead = _HARMLESS_LEAD.match(s)
    if lead and lead[0].strip(" }").endswith(":") and _ANOTHER_LABEL.search(s, lead.end()):
        lead = None
    if lead and not NEGATION.search(lead[0]) and not is_prose(_COPULA.sub("", lead[0])):
        s = s[lead.end() :].strip(" :=")
    if _PROSE.search(re.sub(r"\\text\{[^{}]*\}", "", s)):
        return Literal(text, "a sentence")
    if several := compound(s):
        return Quantity(s, Number(str(several[0]), Exact(several[0])), several[1])
    items = list_items(s)
    if len(items) < 2:
        return _item(s, 0)
    if len(items) > MAX_ITEMS:
        return Literal(s, f"a list of {len(items)} items")
    joined = ungrouped(s)
    return List(s, _items(items, 0), _region(s, 0), None if "," in joined else _item(joined, 0))


def _items(texts: list[str], depth: int) -> tuple[Answer, ...]:
    return tuple(_item(text, depth) for text in texts)


@functools.lru_cache(maxsize=4096)  # a text may be a side, a value and a bound
def _item(text: str, depth: int) -> Answer:
    """The answer that a text within `depth` others is; no list."""
    s, depth = in_digits(unwrap(text)), depth + 1
    if (number := exact_number(s)) is not None:
        return Number(s, number)
    if depth > MAX_NESTING:
        return Literal(s, "nested too deep")
    if "^" in s and (mark := _TRANSPOSED.search(s)):
        match _item(s[: mark.start()], depth):
            case Matrix(rows=rows):
                return Matrix(s, tuple(zip(*rows, strict=False)))
            case Tuple() as column:
                return column
    if (cells := matrix_cells(s)) is not None and cells[0][1:] == cells[1:] == []:
        return _item(cells[0][0], depth)
    if cells is not None:
        return Matrix(s, tuple(_items(row, depth) for row in cells))
    bracketed, members = bracketed_items(s), set_items(s) or whole_numbers(s)
    if len(bracketed) > MAX_ITEMS or len(members or ()) > MAX_ITEMS:
        return Literal(s, "too many items")
    if (point := _POINT.fullmatch(s)) and len(bracketed_items(point[2])) > 1:
        return _read_relation(s, [point[1], point[2]], ["="], depth)
    if bracketed:
        return Tuple(s, s[0], s[-1], _items(bracketed, depth), _region(s, depth))
    if members == ["\\emptyset"]:  # a set of one member, not the empty one
        return Literal(s)
    if members is not None:
        return Set(s, _items(members, depth))
    sides, operators = split_relation(s)
    if operators:
        return _read_relation(s, sides, operators, depth)
    if (
        (s[:1].isalpha() or s.startswith("\\text"))
        and (label := _LABEL.fullmatch(s))
        and not is_prose(label[1], OPERATIONS)
        and not NEGATION.search(label[1])
    ):
        return _read_relation(s, [rf"\text{{{label[1]}}}", label[2]], ["="], depth)
    return _region(s, depth) or _leaf(s)


def _leaf(s: str) -> Answer:
    if "\\infty" in s and not _BINDER.search(s):
        return Literal(s)
    if named := _day_or_time(s):
        return named
    if based := in_base(s):
        return Literal(based)
    if _REMAINDER.fullmatch(s):
        return Literal(s)
    if is_text(s):
        return Words(s)
    if parts := ratio(s):
        return Ratio(s, tuple(plain(part) for part in parts))
    if (split := split_unit(s)) is None:
        return Words(s)
    value = plain(split[0])
    return value if split[1] == NO_UNIT else Quantity(s, value, split[1])


_PERHAPS_NAMED = re.compile(r"(?:\\text\{|[\w\s:,.}])+")


def _day_or_time(s: str) -> Answer | None:
    if not _PERHAPS_NAMED.fullmatch(s):
        return None
    if day := date(s):
        return Literal(day)
    time = clock(s)
    return Clock(s, *time) if time else None


def plain(s: str) -> Number | Expression:
    """A number or an expression, without unit or structure."""
    number = exact_number(s := unwrap(s))
    return Expression(s) if number is None else Number(s, number)


# --- relations and regions -------------------------------------------------------------------------------------------


def _read_relation(s: str, sides: list[str], operators: list[str], depth: int) -> Relation | Approximation:
    sides = [symbol_of(side) for side in sides]
    if operators == ["="] and is_name(sides[1]) and not is_name(sides[0]):  # 5 = x
        sides = sides[::-1]
    named = is_name(sides[0])
    if named and operators == ["="] and sides[0][0] == "(":  # (y, x) = (1, 2)
        letters, values = sides[0][1:-1].split(","), bracketed_items(sides[1])
        order = in_alphabet(letters) if len(letters) == len(values) else []
        if order != sorted(order):
            sides = [f"({', '.join(each[i] for i in order)})" for each in (letters, values)]
    if operators[-1] == "\\approx" and not (len(operators) == 1 and named):
        exact = re.split(r"\\(?:approx|sim|simeq)(?![a-zA-Z])", s)[0]
        return Approximation(s, _item(exact, depth), _items(sides[operators.index("\\approx") + 1 :], depth))
    text = ""
    if named and operators == ["\\in"] and not sides[1].startswith("\\mathbb"):
        text = sides[1]
    elif named and (
        set(operators) <= {"=", "\\approx"} or (operators == ["\\equiv"] and re.fullmatch(SYMBOL, sides[0].strip()))
    ):
        skipped = len(list(itertools.takewhile(is_name, sides[:-1])))  # x = y = 5
        text = sides[skipped]
        for operator, side in zip(operators[skipped:], sides[skipped + 1 :], strict=True):
            text += f" {operator} {side}"
    else:
        named = False
    value = value_of_x = _item(text, depth) if named else None
    if named and (argument := _FUNCTION_NAME.fullmatch(sides[0])):
        value_of_x = _item(renamed(text, argument[1], _ARGUMENT), depth)
    name = sides[0] if named else ""
    return Relation(s, _items(sides, depth), tuple(operators), name, value, value_of_x, _region(s, depth))


def _region(s: str, depth: int) -> Region | None:
    found = bounds_of_region(s)
    if found is None or len(found[0]) > MAX_ITEMS:
        return None
    intervals = tuple(
        Interval(f"{'(['[low_in]}{low},{high}{')]'[high_in]}", _item(low, depth), low_in, _item(high, depth), high_in)
        for low, low_in, high, high_in in found[0]
    )
    return Region(s, intervals, found[1])
