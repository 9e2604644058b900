r"""Whether an answer says the same as the gold: structure first (lists, sets, tuples, intervals, matrices, equations,
units, bases, words), then the leaves as exact numbers, and only then as expressions (symbolic.py).

`equal_cheaply` decides what strings and exact numbers can decide; `equal` decides everything and must run where it can
be killed. The rules are strict in the direction that pays: a longer list, another bracket, another variable, another
unit or base, a relation that is not true, a hedge, are wrong.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from megatron_t1.reward.normalize import Exact, compact, exact_number

MAX_ITEMS = 64
"""Longest list compared item by item."""

_OPERATOR = re.compile(
    r"\\(le|ge|ne|approx|in|equiv|sim|simeq|notin|subset|to|Rightarrow|Leftrightarrow)(?![a-zA-Z])|([<>=])"
)
_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|Delta|Omega|ell|Gamma|Phi"
_SUB = r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))"
_SYMBOL = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-zA-Z])\s*){_SUB}?'*"
_NAME = re.compile(
    rf"{_SYMBOL}\s*(?:\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})*\s*\))?"  # x, a_1, f(x)
    rf"|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)"  # (x, y)
    r"|(?:\\angle|\\triangle|\\vec|\\overline|\\overrightarrow|\\hat)?\s*\{?[A-Z]{1,4}\}?"  # AB, \angle ABC
    rf"|\|\s*\{{?[A-Z]{{1,3}}\}}?\s*\||[A-Z]{_SUB}?(?:\s*:\s*[A-Z]{_SUB}?)+"  # |AB|, A:B
    r"|\\text\{[^{}0-9]*\}\s*[A-Za-z]?|[A-Z]?[a-z]{3,}(?:\s+[a-z]+)*"  # words
)
_UNIT = re.compile(
    r"(.*?[\d})!\w])\s*(?:\\text\{([^{}]*)\}|(?<=[\d}\s])\s*([A-Za-z][A-Za-z]+(?:[ /][A-Za-z]+)*))\s*(?:\^\s*\{?\s*(\d)\s*\}?)?",
    re.S,
)
_UNIT_WORDS = {
    "h": "hour hours hr hrs h", "min": "minute minutes min mins", "s": "second seconds sec secs s",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "m": "meter meters metre metres m", "cm": "centimeter centimeters cm", "mm": "millimeter millimeters mm",
    "km": "kilometer kilometers kilometre kilometres km", "in": "inch inches in", "ft": "foot feet ft",
    "yd": "yard yards yd", "mi": "mile miles mi", "kg": "kilogram kilograms kg", "g": "gram grams g",
    "lb": "pound pounds lb lbs", "l": "liter liters litre litres l", "ml": "milliliter milliliters ml",
    "dollar": "dollar dollars usd bucks", "cent": "cent cents", "mph": "mph", "kmh": "kmh kph", "m/s": "m/s",
    "rad": "radian radians rad", "deg": "degree degrees", "oz": "ounce ounces oz", "gal": "gallon gallons gal",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in words.split()}
_NEGATION = re.compile(r"(?<![a-z])(?:not|never|no|none|neither|nor|except|cannot|isn't|non)(?![a-z])", re.I)
_HARMLESS_WORDS = re.compile(
    r"^\\text\{\s*(?:only|exactly|about|approximately|approx\.?|total|answer|the answer is)\s*:?\s*\}"
)
_OPEN, _CLOSE = "([{", ")]}"


# --- small string tools ----------------------------------------------------------------------------------------------


def split_top(s: str, separators: str) -> list[str]:
    """Split at separators outside every bracket; empty pieces are dropped."""
    pieces, depth, start = [], 0, 0
    for i, char in enumerate(s):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char in separators and depth == 0:
            pieces.append(s[start:i])
            start = i + 1
    pieces.append(s[start:])
    return [p.strip() for p in pieces if p.strip()]


def _split_command(s: str, pattern: str) -> list[str]:
    """Split at a LaTeX command outside every bracket."""
    pieces, start = [], 0
    for match in re.finditer(pattern, s):
        before = s[: match.start()]
        if sum(map(before.count, _OPEN)) == sum(map(before.count, _CLOSE)):
            pieces.append(s[start : match.start()])
            start = match.end()
    pieces.append(s[start:])
    return [p.strip() for p in pieces]


def _closing(s: str) -> int:
    """Index of the bracket that closes the one at 0 (of any shape: intervals mix them), or -1."""
    depth = 0
    for i, char in enumerate(s):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return i
    return -1


def _unwrap(s: str) -> str:
    """Drop outer braces or parentheses that group nothing but the whole."""
    s = s.strip()
    while len(s) > 2 and (s[0], s[-1]) in (("{", "}"), ("(", ")")) and _closing(s) == len(s) - 1:
        if s[0] == "(" and len(split_top(s[1:-1], ",;")) > 1:
            break
        if s[-2] == "\\":
            break
        s = s[1:-1].strip()
    return s


def _words(s: str) -> str:
    """Plain words of a text answer, for comparison."""
    s = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", s)
    s = re.sub(r"[^\w\s]", " ", s.casefold())
    words = [w for w in s.split() if w not in ("the", "a", "an", "is", "are", "and", "or")]
    return " ".join(words)


def _is_text(s: str) -> bool:
    """Words, not mathematics: \\text{...} all over, capital letters naming points, or a word of four letters."""
    bare = re.sub(r"\\text\{[^{}]*\}", "", s)
    if bare != s and not re.search(r"[A-Za-z0-9\\]", bare):
        return True
    s = s.strip("() ")
    return bool(re.fullmatch(r"[A-Z]{2,}|(?:[A-Za-z]{2,}[ ,.\-]+)*[A-Za-z]{4,}", s)) and "\\" not in s


# --- leaves ----------------------------------------------------------------------------------------------------------


def _rounded_equal(decimal: Exact, exact: Fraction) -> bool:
    """`exact` rounded to the decimal's places gives the decimal, which has at least three significant digits."""
    if decimal.decimals is None or decimal.decimals < 1 or decimal.digits < 3:
        return False
    return abs(exact - decimal.value) <= Fraction(1, 2 * 10**decimal.decimals)


def numbers_equal(gold: Exact, answer: Exact) -> bool:
    """Exact equality; or one is a decimal and the other rounds to it.

    A decimal answer to an exact gold (600/7 as 85.71) needs four significant digits and must not be an integer gold;
    a shorter decimal answer to a decimal gold (2.65 for 2.653) three.
    """
    if gold.value == answer.value:
        return True
    if gold.decimals is not None and answer.decimals is None:
        return answer.value.denominator > 1 and _rounded_equal(gold, answer.value)
    if gold.decimals is None and answer.decimals is not None:
        return gold.value.denominator > 1 and answer.digits >= 4 and _rounded_equal(answer, gold.value)
    if gold.decimals is not None and answer.decimals is not None:
        return 2 <= answer.decimals < gold.decimals and _rounded_equal(answer, gold.value)
    return False


def _split_unit(s: str) -> tuple[str, str]:
    """(value, unit) of a leaf; the unit is canonical, with its power, '%' and '^\\circ' included."""
    s = s.strip()
    if s.endswith("%"):
        return s[:-1].strip(), "%"
    if s.endswith("^\\circ"):
        value = s[: -len("^\\circ")].strip()
        return value, "deg"
    s = re.sub(r"\s*\^\s*\{\s*(?:\\text\{)?\s*(?:th|st|nd|rd)\s*\}?\s*\}$|(?<=\d)(?:th|st|nd|rd)\b.*$", "", s)
    if (m := re.fullmatch(r"([+-]?[\d.,]+)\s+(m|g|s|h|l|L|km|cm)(?:\s*\^\s*\{?\s*(\d)\s*\}?)?", s)) or (
        m := _UNIT.fullmatch(s)
    ):
        value = m[1].strip()
        word = (m[2] or (m[3] if m.re is _UNIT else None) or "").strip(" .").casefold()
        power = m[m.re.groups] or "1"
        if m.re is _UNIT and m[3] and not re.fullmatch(r"[\d.,/\s+\-]+|.*\}", value):
            return s, ""
        if _NEGATION.search(word):
            return s, ""
        square = re.match(r"(?:square|sq\.?)\s+(\w+)", word) or re.match(r"cubic\s+(\w+)", word)
        if square:
            power = "3" if word.startswith("cubic") else "2"
            word = square[1]
        unit = _UNITS.get(word, word)
        return value, unit if power == "1" or not unit else f"{unit}^{power}"
    return s, ""


def _units_clash(gold: str, answer: str) -> bool:
    known = set(_UNITS.values())
    base_gold, base_answer = gold.split("^")[0], answer.split("^")[0]
    return bool(gold and answer and gold != answer and (base_gold in known or base_answer in known))


def _base(s: str) -> tuple[str, str] | None:
    m = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d{1,2}|\\text\{[a-z]+\})\s*\}?", s)
    return (m[1], m[2]) if m else None


def _ratio(s: str) -> str:
    """a:b of plain terms as a fraction; clock times stay."""
    parts = split_top(s, ":")
    if len(parts) == 2 and ":" in s and not re.fullmatch(r"\d{1,2}:\d\d", compact(s)):
        return rf"\frac{{{_unwrap(parts[0])}}}{{{_unwrap(parts[1])}}}"
    return s


def _leaf(gold: str, answer: str) -> bool:
    if compact(gold) == compact(answer):
        return True
    gold, answer = _HARMLESS_WORDS.sub("", gold), _HARMLESS_WORDS.sub("", answer)
    g_base, a_base = _base(gold), _base(answer)
    if g_base or a_base:
        return g_base == a_base
    if _is_text(gold):
        return _words(gold) == _words(answer) != ""
    if _is_text(answer):
        return False
    g_value, g_unit = _split_unit(gold)
    a_value, a_unit = _split_unit(answer)
    if _units_clash(g_unit, a_unit) and "%" not in (g_unit, a_unit):
        return False
    if "deg" in (g_unit, a_unit) and g_unit != a_unit and ("\\pi" in gold or "\\pi" in answer):
        return _expressions(gold, answer)
    if a_unit == "%" and g_unit != "%":  # "4%" is 0.04, never 4
        return _values(g_value, rf"\frac{{{a_value}}}{{100}}")
    if g_unit == "%" and a_unit == "" and not _values(g_value, a_value):
        return _values(rf"\frac{{{g_value}}}{{100}}", a_value)
    if _values(g_value, a_value):
        return True
    return (
        (g_unit, a_unit) != ("", "")
        and (g_value, a_value) != (gold, answer)
        and "\\text" not in gold + answer
        and _expressions(gold, answer)
    )


def _values(gold: str, answer: str) -> bool:
    gold, answer = _ratio(_unwrap(gold)), _ratio(_unwrap(answer))
    if compact(gold) == compact(answer):
        return True
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a)
    if (re.fullmatch(r"-?\d+,\d+", gold) and "." in answer) or (re.fullmatch(r"-?\d+,\d+", answer) and "." in gold):
        g, a = exact_number(gold.replace(",", ".")), exact_number(answer.replace(",", "."))
        return g is not None and a is not None and g.value == a.value
    return _expressions(gold, answer, g)


def _expressions(gold: str, answer: str, gold_number: Exact | None = None) -> bool:
    from megatron_t1.reward import symbolic  # heavy, and only allowed inside a worker

    if (
        not gold
        or not answer
        or ("\\text" in answer and "\\text" not in gold and not re.search(r"\\text\{\s*[A-Za-z]\s*\}", answer))
    ):
        return False
    if symbolic.expressions_equal(gold, answer):
        return True
    if gold_number is not None and gold_number.decimals is not None and gold_number.digits >= 3:
        value = symbolic.decimal_value(answer)
        return value is not None and abs(value) < 1e30 and _rounded_equal(gold_number, Fraction(str(value)))
    answer_number = exact_number(answer)
    if (
        answer_number is not None
        and answer_number.digits >= 4
        and re.search(r"%|\\frac|/", gold)
        and not re.search(r"\\pi|\\sqrt|\\log|\\ln|e", gold)
    ):
        value = symbolic.decimal_value(gold)
        return value is not None and abs(value) < 1e30 and _rounded_equal(answer_number, Fraction(str(value)))
    return False


# --- relations -------------------------------------------------------------------------------------------------------


def _is_name(s: str) -> bool:
    return bool(_NAME.fullmatch(s.strip())) and s.strip() not in ("e", "\\pi")


def _relation(s: str) -> tuple[list[str], list[str]]:
    """(sides, operators) of a chain at top level; `sim`, `simeq` read as approx."""
    sides, operators, start = [], [], 0
    for match in _OPERATOR.finditer(s):
        before = s[: match.start()]
        if sum(map(before.count, _OPEN)) != sum(map(before.count, _CLOSE)):
            continue
        sides.append(s[start : match.start()].strip())
        operators.append(match[1] or match[2])
        start = match.end()
    return [*sides, s[start:].strip()], ["approx" if o in ("sim", "simeq") else o for o in operators]


_FLIP = {"<": ">", ">": "<", "le": "ge", "ge": "le"}
Interval = tuple[str, bool, str, bool]
"""(low, low closed, high, high closed)"""


def _interval_of_relation(s: str) -> Interval | None:
    sides, operators = _relation(s)
    if not operators or any(o not in _FLIP for o in operators):
        return None
    if len(operators) == 1:
        left, right = sides
        operator = operators[0]
        if not _is_name(left) and _is_name(right):
            left, right, operator = right, left, _FLIP[operator]
        if not _is_name(left):
            return None
        closed = operator in ("le", "ge")
        return ("-\\infty", False, right, closed) if operator in ("<", "le") else (right, closed, "\\infty", False)
    if len(operators) == 2 and _is_name(sides[1]):
        first, second = operators
        if {first, second} <= {"<", "le"}:
            return sides[0], first == "le", sides[2], second == "le"
        if {first, second} <= {">", "ge"}:
            return sides[2], second == "ge", sides[0], first == "ge"
    return None


def _interval(s: str) -> Interval | None:
    s = s.strip()
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and _closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",")
        if len(items) == 2:
            return items[0], s[0] == "[", items[1], s[-1] == "]"
    if m := re.fullmatch(r"\\\{(.*)\\\}", s, re.S):
        parts = re.split(r"\||:", m[1], maxsplit=1)
        return _interval_of_relation(parts[1].strip()) if len(parts) == 2 else None
    return _interval_of_relation(s)


def _region(s: str) -> list[Interval] | None:
    """A union of intervals, however it is written; None when it is something else."""
    sides, operators = _relation(s)
    if len(operators) == 1 and operators[0] == "in" and _is_name(sides[0]):
        s = sides[1]
    if m := re.fullmatch(r"\\\{([^|]*)\|(.*)\\\}", s, re.S):
        s = m[2].strip()
    pieces = _split_command(s, r"\\cup(?![a-zA-Z])")
    if len(pieces) == 1:
        pieces = split_top(s, ",;") if _OPERATOR.search(s) else [s]
    regions = [_interval(p) for p in pieces]
    return [r for r in regions if r is not None] if all(regions) else None


def _regions_equal(gold: list[Interval], answer: list[Interval]) -> bool:
    def same(g: Interval, a: Interval) -> bool:
        return g[1] == a[1] and g[3] == a[3] and _item(g[0], a[0]) and _item(g[2], a[2])

    return _match_unordered(gold, answer, same)


def _strip_name(s: str) -> tuple[str, str]:
    """(name, value) of "x = 5", "f(x) = ...", "x = y = 5", "x \\in S"; name '' when there is none."""
    sides, operators = _relation(s)
    if (operators and all(o in ("=", "approx") for o in operators) and operators[0] == "=") or operators == ["approx"]:
        if all(_is_name(side) for side in sides[:-1]):
            return sides[0], sides[-1]
        if _is_name(sides[0]):
            return sides[0], s[s.index("=") + 1 :].strip() if "=" in s else sides[-1]
    if operators == ["in"] and _is_name(sides[0]) and not sides[1].startswith("\\mathbb"):
        return sides[0], sides[1]
    return "", s


def _names_clash(gold: str, answer: str) -> bool:
    """Two plain variables with different names; functions may name their argument as they like."""
    g, a = compact(gold), compact(answer)
    single = re.compile(rf"{_SYMBOL}")
    return bool(single.fullmatch(g) and single.fullmatch(a)) and g != a


def _rename_argument(name: str, value: str) -> str:
    m = re.fullmatch(rf"\s*[A-Za-z]'*{_SUB}?\s*\(\s*([a-zA-Z])\s*\)\s*", name)
    if not m:
        return value
    return re.sub(rf"(?<![a-zA-Z\\]){m[1]}(?![a-zA-Z])|(?<=[0-9]){m[1]}(?![a-zA-Z])", "x", value)


def _equations(gold: str, answer: str) -> bool | None:
    """Equality when at least one side is a relation; None when neither is."""
    g_sides, g_ops = _relation(gold)
    a_sides, a_ops = _relation(answer)
    if not g_ops and not a_ops:
        return None
    if g_ops == ["approx"] and not _is_name(g_sides[0]):
        return any(_item(side, answer) for side in g_sides)
    if a_ops and a_ops[-1] == "approx" and not _is_name(a_sides[0]):
        return _item(gold, answer[: answer.rindex("\\approx")].strip())
    g_name, g_value = _strip_name(gold)
    a_name, a_value = _strip_name(answer)
    if g_name and a_name and _names_clash(g_name, a_name):
        return False
    if g_name or a_name:
        if g_name:
            g_value = _rename_argument(g_name, g_value) if a_name or "(" in g_name else g_value
        if a_name:
            a_value = _rename_argument(a_name, a_value)
        if not g_ops or g_name:
            if not a_ops or a_name:
                return _item(g_value, a_value)
    if (
        set(a_ops) <= {"=", "approx"} and not g_ops and a_ops
    ):  # an equation for a value: all its sides must be that value
        return all(_item(gold, side) for side in a_sides)
    if len(g_ops) == 1 and len(a_ops) == 1 and g_ops[0] in (*_FLIP, "=", "ne") and a_ops[0] in (*_FLIP, "=", "ne"):
        from megatron_t1.reward import symbolic

        return symbolic.relations_equal((g_sides[0], g_ops[0], g_sides[1]), (a_sides[0], a_ops[0], a_sides[1]))
    if g_ops == a_ops and len(g_sides) == len(a_sides):
        return all(_item(g, a) for g, a in zip(g_sides, a_sides, strict=True))
    return False


# --- structures ------------------------------------------------------------------------------------------------------


def _match_unordered(gold: list, answer: list, same) -> bool:  # type: ignore[no-untyped-def, type-arg]
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    left = list(answer)
    for g in gold:
        hit = next((i for i, a in enumerate(left) if same(g, a)), None)
        if hit is None:
            return False
        left.pop(hit)
    return True


def _expand_plus_minus(items: list[str]) -> list[str]:
    out = []
    for item in items:
        if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", item) and len(re.findall(r"\\(?:pm|mp)", item)) <= 2:
            for plus, minus in (("+", "-"), ("-", "+")):
                new = re.sub(r"\\pm(?![a-zA-Z])", plus, item)
                out.append(re.sub(r"\\mp(?![a-zA-Z])", minus, new).lstrip("+ "))
        else:
            out.append(item)
    return out


def _matrix(s: str) -> list[list[str]] | None:
    m = re.fullmatch(r"\\begin\{([pbvB]?)(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{.*?\}", s, re.S)
    if not m or m[1] == "v":
        return None
    rows = [[c.strip() for c in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if row.strip()]
    return rows if all(cell for row in rows for cell in row) else None


def _tuple(s: str) -> tuple[str, str, list[str]] | None:
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and _closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",")
        if len(items) >= 2:
            return s[0], s[-1], items
    return None


def _set(s: str) -> list[str] | None:
    m = re.fullmatch(r"\\\{(.*)\\\}", s, re.S)
    if not m or _closing(s[1:]) != len(s) - 2 or "|" in m[1]:
        return None
    return _expand_plus_minus(split_top(m[1], ",;"))


def _item(gold: str, answer: str) -> bool:
    gold, answer = _unwrap(gold), _unwrap(answer)
    if compact(gold) == compact(answer):
        return True
    if exact_number(gold) and exact_number(answer):
        return numbers_equal(exact_number(gold), exact_number(answer))  # type: ignore[arg-type]
    g_matrix, a_matrix = _matrix(gold), _matrix(answer)
    if g_matrix or a_matrix:
        a_tuple, g_tuple = _tuple(answer), _tuple(gold)
        if g_matrix and a_tuple and all(len(r) == 1 for r in g_matrix):
            a_matrix = [[x] for x in a_tuple[2]]
        if a_matrix and g_tuple and all(len(r) == 1 for r in a_matrix):
            g_matrix = [[x] for x in g_tuple[2]]
        if not g_matrix or not a_matrix or [len(r) for r in g_matrix] != [len(r) for r in a_matrix]:
            return _equations(gold, answer) or False
        if sum(map(len, g_matrix)) > MAX_ITEMS:
            return False
        return all(_item(g, a) for g, a in zip(itertools.chain(*g_matrix), itertools.chain(*a_matrix), strict=True))
    g_tuple, a_tuple = _tuple(gold), _tuple(answer)
    if g_tuple and a_tuple:
        if g_tuple[:2] != a_tuple[:2] or len(g_tuple[2]) != len(a_tuple[2]) or len(g_tuple[2]) > MAX_ITEMS:
            return False
        return all(_item(g, a) for g, a in zip(g_tuple[2], a_tuple[2], strict=True))
    g_set, a_set = _set(gold), _set(answer)
    if g_set is not None or a_set is not None:
        g_items = g_set if g_set is not None else _expand_plus_minus(split_top(_strip_name(gold)[1], ",;"))
        a_items = a_set if a_set is not None else _expand_plus_minus(split_top(_strip_name(answer)[1], ",;"))
        if (g_set is None and (g_tuple or _region(gold))) or (a_set is None and (a_tuple or _region(answer))):
            return False
        return _match_unordered(g_items, a_items, _item)
    g_region, a_region = _region(gold), _region(answer)
    if g_region and a_region and not (g_tuple and a_tuple):
        if _regions_equal(g_region, a_region):
            return True
        if len(_relation(gold)[1]) != 1 or len(_relation(answer)[1]) != 1:
            return False
    by_relation = _equations(gold, answer)
    if by_relation is not None:
        return by_relation
    if g_tuple or a_tuple or g_region or a_region:
        return False
    return _leaf(gold, answer)


def _one_tuple_or_list(s: str) -> list[str]:
    items = split_top(s, ",;")
    if len(items) == 1 and (t := _tuple(items[0])) and t[:2] == ("(", ")"):
        return t[2]
    return items


def _lists(gold: str, answer: str) -> bool:
    g_text = _is_text(gold.replace(",", " "))
    if g_text:
        return _words(gold) == _words(answer) != ""
    g_number, a_number = exact_number(gold), exact_number(answer)
    g_items = _expand_plus_minus([gold] if g_number else split_top(gold, ",;"))
    a_items = _expand_plus_minus([answer] if a_number else split_top(answer, ",;"))
    if len(g_items) > 1 and a_number and "," in answer:
        a_items = split_top(answer, ",")
    if len(g_items) == 1 and len(a_items) == 1:
        return _item(g_items[0], a_items[0])
    g_region, a_region = _region(gold), _region(answer)
    if g_region and a_region:
        return _regions_equal(g_region, a_region)
    if len(g_items) == 1 or len(a_items) == 1:
        single, several = (g_items[0], a_items) if len(g_items) == 1 else (a_items[0], g_items)
        single = _unwrap(_strip_name(single)[1])
        inside = _set(single)
        if inside is not None:
            g_in, a_in = (inside, several) if len(g_items) == 1 else (several, inside)
            return _match_unordered(g_in, a_in, _item)
        inner = split_top(single, ",;")
        if len(inner) > 1:  # "x = 1, 2" or {1, 2}
            g_in, a_in = (inner, several) if len(g_items) == 1 else (several, inner)
            return _match_unordered(g_in, a_in, _item)
        t = _tuple(single)
        if t and t[:2] == ("(", ")"):
            g_in, a_in = (t[2], several) if len(g_items) == 1 else (several, t[2])
            return len(g_in) == len(a_in) and all(_item(g, a) for g, a in zip(g_in, a_in, strict=True))
        return False
    if len(g_items) != len(a_items) or len(g_items) > MAX_ITEMS:
        return False
    if _match_unordered(g_items, a_items, _item):
        return True
    return False


def equal_cheaply(gold: str, answer: str) -> bool | None:
    """Verdict of strings and exact numbers on normalised texts; None when only `equal` can tell."""
    if compact(gold) == compact(answer):
        return True
    g, a = exact_number(gold), exact_number(answer)
    if g is not None and a is not None:
        return numbers_equal(g, a)
    if not answer:
        return False
    return None


def equal(gold: str, answer: str) -> bool:
    """Verdict on normalised texts. Run it where it can be killed.

    Raises:
        CannotDecide: the mathematics cannot be read or is too large.
    """
    cheap = equal_cheaply(gold, answer)
    return cheap if cheap is not None else _lists(gold, answer)
