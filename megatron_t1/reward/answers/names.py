r"""Names of values: which two cannot be meant for one value, and the order in which named values make a tuple; and
whether "and" and "or" make a difference between the items of two lists.

They list the same of values of one thing: 2 and 3, x = 2 or x = 3, two lines. They do not where the items are said of
different things, x = 0 or y = 0; a comma is an "and" there. Of bare letters (p, q) it depends on whether both say one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from megatron_t1.reward.answers.brackets import depths, in_alphabet
from megatron_t1.reward.answers.kinds import Answer, List, Matrix, Number, Quantity, Relation, Set, Tuple
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.quantities import Unit
from megatron_t1.reward.answers.relations import SYMBOL, is_name
from megatron_t1.reward.answers.words import JOINT

_FAMILIES = [
    set(line.split())
    for line in """mean median mode range variance deviation
max min
length width height depth
area perimeter circumference volume
radius diameter
sum product difference quotient remainder
numerator denominator
gcd lcm
det trace rank
domain range""".splitlines()
]
"""Words that name different values of one thing; other words may be different names of one value."""
_FAMILIAR = set[str]().union(*_FAMILIES)
_ALIASES = {
    "average": "mean", "var": "variance", "sd": "deviation", "std": "deviation", "maximum": "max", "minimum": "min",
    "hcf": "gcd", "gcf": "gcd", "breadth": "width", "E": "mean", "D": "variance", "Var": "variance",
    "determinant": "det", "tr": "trace",
}  # fmt: skip
_LETTER = re.compile(r"(?:\\neg\s*)?[A-Za-z]")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus|complement)")
_IN_ANY_ORDER = re.compile(r"([A-Z])(\\c[ua]p )([A-Z])")
_CAPITALS = re.compile(r"(?<![A-Z])[A-Z]{1,5}(?![A-Za-z(\[_])")
_MARK = re.compile(r"'|\^\{-1\}")
_POINTS = re.compile(r"(?:\\(angle|triangle|vec|overrightarrow|overline) ?)?[{|]?([A-Z]{1,4})[|}]?")


def labels(items: Sequence[Answer]) -> list[str]:
    """Names, nouns or kinds of units of items, when each has another one; x_1 and x_2 are one name for two values."""
    found = []
    for item in items:
        match item:
            case Relation(name=name, value=Answer()):
                label = re.sub(r"\\(?:text|(?=m[ai][xn]))|[{}]", "", compact(name)).split("_")[0]
                label = label.casefold().removesuffix("imum").removesuffix("s") if len(label) > 2 else label
                found.append(label)
            case Quantity(unit=Unit(kind=kind, noun=noun)):
                found.append(noun or str(kind))
    return found if len(set(found)) == len(items) > 1 else []


def names(items: Sequence[Answer]) -> set[str]:
    return {compact(item.name) for item in items if isinstance(item, Relation) and item.value}


def unlabelled(item: Answer) -> Answer:
    return item.value if isinstance(item, (Relation, Quantity)) and item.value else item


def value_of(answer: Answer) -> Answer:
    """What a name stands for, or the answer itself."""
    return answer.value if isinstance(answer, Relation) and answer.value else answer


# --- order -----------------------------------------------------------------------------------------------------------


def members_in_order(gold: Answer, answer: Answer) -> tuple[Sequence[Answer], Sequence[Answer]]:
    """The parts of a list and of a tuple, each in the order of its names; of the answer none when they name others."""
    (g_names, g_items), (a_names, a_items) = _named_members(gold), _named_members(answer)
    if g_names and sorted(g_names) == sorted(a_names):
        by_name = dict(zip(a_names, a_items, strict=True))
        return g_items, [by_name[name] for name in g_names]
    if len(g_names) == len(a_names) and any(map(_symbols_clash, g_names, a_names)):
        return g_items, []
    return g_items, a_items


def _named_members(answer: Answer) -> tuple[list[str], Sequence[Answer]]:
    """(names, values) of x = 1, y = 2 and of (x, y) = (1, 2), and ([], parts) of what has no names."""
    items, own = _members(answer), list[str]()
    match answer:
        case List() if len(names(items)) == len(items):
            own = [compact(item.name) for item in items if isinstance(item, Relation)]
            items = [value_of(item) for item in items]
        case Relation(name=name, value=Tuple()) if name.startswith("("):
            own = compact(name)[1:-1].split(",")
    if len(own) != len(items):
        return [], items
    order = in_alphabet(own)
    return [own[i] for i in order], [items[i] for i in order]


def _members(answer: Answer) -> Sequence[Answer]:
    match value_of(answer):
        case List(items=items) | Set(items=items) | Tuple(items=items):
            return items
        case Matrix(rows=rows) if all(len(row) == 1 for row in rows):
            return [row[0] for row in rows]
    return [answer]


# --- two names -------------------------------------------------------------------------------------------------------


def names_clash(gold: Relation, answer: Relation) -> bool:
    """Whether none of the names of the one value (x = y = 5) can be meant for the other. Functions may name themselves
    and their argument as they like, but not an argument that their value leaves open, as in P(A) = p."""
    pairs = itertools.product(all_names(gold), all_names(answer))
    if all(_two_clash(g, a) for g, a in pairs):
        return True
    arguments = [_spelled(each.name).partition("(")[2].rstrip(")") for each in (gold, answer)]
    is_open = arguments[0] != arguments[1] and all(arguments) and gold.value == gold.value_of_x
    return is_open and not all(argument in "nstuxyz" for argument in arguments)


def all_names(relation: Relation) -> list[str]:
    """Of x = y = 5, x and y."""
    own = itertools.takewhile(is_name, (side.text for side in relation.sides[:-1]))
    return [_spelled(name) for name in own] or [_spelled(relation.name)]


def _spelled(name: str) -> str:
    """Compact, with A before B in B \\cup A."""
    return _IN_ANY_ORDER.sub(lambda m: f"{min(m[1], m[3])}{m[2]}{max(m[1], m[3])}", compact(name))


def _two_clash(gold: str, answer: str) -> bool:
    if gold == answer:
        return False
    if _SET_OPERATION.findall(gold) != _SET_OPERATION.findall(answer):
        return True
    if all(re.fullmatch(SYMBOL, name) for name in (gold, answer)):
        return _symbols_clash(gold, answer)
    if gold[0] == answer[0] and _MARK.findall(gold) != _MARK.findall(answer):  # f and its inverse, f and f'
        return True
    if ":" in gold and ":" in answer:  # AB:CD and BA:DC
        return [sorted(part) for part in gold.split(":")] != [sorted(part) for part in answer.split(":")]
    (g_rest, g_points), (a_rest, a_points) = _without_points(gold), _without_points(answer)
    others = g_rest == a_rest != "#" and g_points != a_points  # area of ABC and of ABD
    familiar = [_familiar_words(name) for name in (gold, answer)]
    if all(familiar):
        clash = any(all(said & family for said in familiar) and not familiar[0] & familiar[1] for family in _FAMILIES)
        return clash or others
    points = [_POINTS.fullmatch(name) for name in (gold, answer)]
    if points[0] and points[1]:
        return not _same_points(points[0], points[1])
    return others or gold in re.findall(SYMBOL, answer.partition("(")[2])  # max(x, 1) for x


def _without_points(name: str) -> tuple[str, list[list[str]]]:
    """What a name has beside names of points and sets; these, each with its letters in order."""
    return _CAPITALS.sub("#", name), [sorted(points) for points in _CAPITALS.findall(name)]


def _symbols_clash(gold: str, answer: str) -> bool:
    return gold != answer and not (gold == answer.split("_")[0] and answer.rstrip("}")[-1].isdecimal())  # x for x_1


def _familiar_words(name: str) -> set[str]:
    said = re.findall(r"[A-Za-z]+", re.split(r"[(\[]", name)[0])
    words = (_ALIASES.get(word) or _ALIASES.get(word.casefold(), word.casefold()) for word in said)
    return {word if word in _FAMILIAR else word.removesuffix("s") for word in words} & _FAMILIAR


def _same_points(gold: re.Match[str], answer: re.Match[str]) -> bool:
    """AB for BA, angle ABC for CBA and for angle B, triangle ABC for BCA; a lone letter may stand for a length."""
    kinds = {gold[1], answer[1]}
    short, long = sorted((gold[2], answer[2]), key=len)
    if kinds & {"vec", "overrightarrow"}:
        return short == long
    if "angle" in kinds:
        return short in (long, long[::-1]) or ((len(short), len(long)) == (1, 3) and short == long[1])
    return short not in long if len(short) == 1 < len(long) else sorted(short) == sorted(long)


# --- and, or ----------------------------------------------------------------------------------------------------------


def joints_clash(gold: Answer, answer: Answer) -> bool:
    """Whether one says "or" and the other doesn't, of items where that matters."""
    joints = [_joints(each) for each in (gold, answer)]
    if ("\\lor" in joints[0]) == ("\\lor" in joints[1]):
        return False
    lists = [each.items for each in (gold, answer) if isinstance(each, List)]
    return any(map(_are_conditions, lists)) or (all(joints) and any(map(_are_letters, lists)))


def _joints(answer: Answer) -> set[str]:
    """Outside its brackets."""
    found = list(JOINT.finditer(answer.text)) if isinstance(answer, List) else []
    depth = depths(answer.text) if found else []
    return {m[0] for m in found if depth[m.start()] == 0}


def _are_conditions(items: Sequence[Answer]) -> bool:
    """Inequalities, or numbers for different names."""
    relations = [item for item in items if isinstance(item, Relation)]
    if any(not set(relation.operators) <= {"=", "\\in", "\\approx", "\\equiv"} for relation in relations):
        return True
    named = {compact(item.name).split("_")[0] for item in relations if isinstance(item.value, (Number, Quantity))}
    return len(named) > 1 and len(relations) == len(items) and all(item.value for item in relations)


def _are_letters(items: Sequence[Answer]) -> bool:
    return all(_LETTER.fullmatch(item.text) for item in items)
