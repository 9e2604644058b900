r"""Whether an answer says the same as the gold: what structures.py takes apart is compared here part by part, its
leaves by leaves.py, and expressions by expressions.py.

`equal_cheaply` decides what strings and exact numbers can decide; `equal` decides everything and must run where it can
be killed. Strict in the direction that pays: a longer list, another bracket, another variable, a relation that does not
hold, a hedge are wrong.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_t1.reward.answers.brackets import unwrap
from megatron_t1.reward.answers.latex import UndecidableError
from megatron_t1.reward.answers.normalize import compact, exact_number
from megatron_t1.reward.answers.quantities import check_readable_leaf, is_text, leaves_equal, numbers_equal, words
from megatron_t1.reward.answers.structures import (
    CUP,
    MAX_ITEMS,
    MIRRORED,
    Interval,
    is_name,
    list_of,
    matrix_of,
    name_and_value,
    names_clash,
    region_of,
    rows_of,
    set_of,
    split_relation,
    tuple_of,
    variable_of,
    with_argument_x,
)

T = TypeVar("T")
_TRAILING_CLAUSE = re.compile(
    r"(?:[,(]\s*|\s+)[a-zA-Z]\s*\\in\s*\\mathbb\{?[ZNRQ]\}?(?:[_^+*{}>0\s]*)\)?$"
    r"|,?\s*(?:\\text\{[\s,(]*(?:for (?:all|any|every|each)|where)\b[^{}]*\}"
    r"|(?<![a-z])for (?:all|any|every|each)\b).*$",
    re.S,
)


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


def _intervals_equal(gold: Interval, answer: Interval) -> bool:
    return (gold[1], gold[3]) == (answer[1], answer[3]) and _item(gold[0], answer[0]) and _item(gold[2], answer[2])


def _matrices_equal(gold: str, answer: str) -> bool:
    g, a = rows_of(gold), rows_of(answer)
    if not g or not a or [len(row) for row in g] != [len(row) for row in a]:
        return False
    return _same_sequence(list(itertools.chain(*g)), list(itertools.chain(*a)))


def _once(items: list[str]) -> list[str]:
    return list({compact(item): item for item in items}.values())


def _relations_equal(gold: str, answer: str) -> bool:
    """When at least one side is a relation."""
    from megatron_t1.reward.answers import expressions  # heavy, and only allowed inside a worker

    g_sides, g_ops = split_relation(gold)
    a_sides, a_ops = split_relation(answer)
    if g_ops[-1:] == ["\\approx"] and not (len(g_ops) == 1 and is_name(g_sides[0])):
        return _item(gold[: gold.rindex("\\approx")].strip(), answer) or (not a_ops and _item(g_sides[-1], answer))
    if a_ops[-1:] == ["\\approx"] and not (len(a_ops) == 1 and is_name(a_sides[0])):
        return _item(gold, re.split(r"\\(?:approx|sim|simeq)(?![a-zA-Z])", answer)[0].strip())
    g_name, g_value = name_and_value(gold)
    a_name, a_value = name_and_value(answer)
    if g_name and a_name:
        if names_clash(g_name, a_name):
            return False
        return _item(with_argument_x(g_name, g_value), with_argument_x(a_name, a_value))
    if a_name and not g_ops:
        return _item(gold, a_value)
    if g_name and not a_ops:
        return _item(g_value, answer)
    if not g_ops:  # an equation where a value was asked: all its sides must be that value, or leave it open
        if not set(a_ops) <= {"=", "\\approx"} or not _item(gold, a_sides[-1]):
            return False
        return all(_item(gold, side) or (compact(gold) != "0" and expressions.is_open(side)) for side in a_sides[:-1])
    if g_ops == ["="] and (not a_ops or a_name):
        return expressions.solves(g_sides[0], g_sides[1], compact(a_name), a_value)
    comparable = {*MIRRORED, "=", "\\ne"}
    if len(g_ops) == len(a_ops) == 1 and g_ops[0] in comparable and a_ops[0] in comparable:
        return expressions.relations_equal((g_sides[0], g_ops[0], g_sides[1]), (a_sides[0], a_ops[0], a_sides[1]))
    return g_ops == a_ops and _same_sequence(g_sides, a_sides)


def _item(gold: str, answer: str) -> bool:
    """Two single answers (not lists)."""
    gold, answer = unwrap(gold), unwrap(answer)
    cheap = equal_cheaply(gold, answer)
    if cheap is not None:
        return cheap
    if matrix_of(gold) or matrix_of(answer):
        return _matrices_equal(gold, answer)
    g_tuple, a_tuple = tuple_of(gold), tuple_of(answer)
    if g_tuple and a_tuple:
        return g_tuple[:2] == a_tuple[:2] and _same_sequence(g_tuple[2], a_tuple[2])
    g_set, a_set = set_of(gold), set_of(answer)
    if g_set is not None and a_set is not None:
        return _same_items(g_set, a_set, _item)
    if g_set is not None and len(g_set) == 1:
        return _item(g_set[0], answer)
    if a_set is not None and len(a_set) == 1:
        return _item(gold, a_set[0])
    g_region, a_region = region_of(gold), region_of(answer)
    if g_region and a_region:
        if names_clash(variable_of(gold), variable_of(answer)):
            return False
        if _same_items(g_region, a_region, _intervals_equal):
            return True
        if g_tuple or a_tuple or len(g_region) != 1 or len(a_region) != 1:
            return False
    if split_relation(gold)[1] or split_relation(answer)[1]:
        return _relations_equal(gold, answer)
    if g_tuple or a_tuple or g_region or a_region or g_set is not None or a_set is not None:
        return False
    return leaves_equal(gold, answer)


def _lists(gold: str, answer: str) -> bool:
    """Two answers of which any may be a list."""
    g_items, a_items = list_of(gold), list_of(answer)
    if len(g_items) == 1 and len(a_items) == 1:
        return _item(gold, answer)
    g_region, a_region = region_of(gold), region_of(answer)
    if g_region and a_region and (split_relation(gold)[1] or split_relation(answer)[1] or CUP.search(gold + answer)):
        return _same_items(g_region, a_region, _intervals_equal)
    if len(g_items) > 1 and len(a_items) > 1:
        return _same_items(g_items, a_items, _item) or _same_items(_once(g_items), _once(a_items), _item)
    single = unwrap(name_and_value(gold if len(g_items) == 1 else answer)[1])
    bracket = tuple_of(single)
    if bracket and bracket[:2] == ("(", ")"):  # a tuple against a bare list: in order
        return _same_sequence(bracket[2], a_items) if len(g_items) == 1 else _same_sequence(g_items, bracket[2])
    members = set_of(single)
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
    items = list_of(s)
    bracket, members, rows = tuple_of(s), set_of(s), matrix_of(s)
    if rows:
        parts = list(itertools.chain(*rows))
    elif bracket:
        parts = bracket[2]
    elif members is not None:
        parts = members
    elif len(items) > 1:
        parts = items
    elif region := region_of(s):
        parts = [bound for interval in region for bound in (interval[0], interval[2])]
    elif split_relation(s)[1]:
        parts = split_relation(s)[0]
    else:
        check_readable_leaf(s)
        return
    for part in parts:
        if part == s:
            raise UndecidableError(f"{part[:60]!r} cannot be read")
        check_readable(part)
