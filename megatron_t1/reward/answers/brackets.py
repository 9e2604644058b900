"""Taking normalised answers apart by their brackets. Intervals mix bracket shapes, so all shapes count alike."""

from __future__ import annotations

import itertools
import re

from megatron_t1.reward.answers.normalize import GREEK
from megatron_t1.reward.answers.words import JOINT

_LEADING_JOINT = re.compile(rf"^{JOINT.pattern}\s*")
_OR = re.compile(r",\s*\\lor(?![a-zA-Z])")
_OPEN, _CLOSE = "([{", ")]}"
OPERATOR = re.compile(
    r"\\(?:le|ge|ne|approx|in|equiv|simeq|sim|notin|subset|to|Rightarrow|parallel|perp)(?![a-zA-Z])|[<>=]"
)
CUP = re.compile(r"\\cup(?![a-zA-Z])")
MAX_LAYERS = 32
"""Brackets around brackets beyond this are no answer; each layer is walked."""


def depths(s: str) -> list[int]:
    """Bracket depth before each character."""
    out, depth = [], 0
    for char in s:
        out.append(depth)
        depth += (char in _OPEN) - (char in _CLOSE)
    return out


def split_top(s: str, separators: str) -> list[str]:
    """Split at single-character separators outside every bracket; empty pieces are dropped, and "and" and "or"."""
    pieces = split_at(s, re.compile(f"[{re.escape(separators)}]"))[0]
    return [piece for piece in (_LEADING_JOINT.sub("", p) for p in pieces) if piece]


def split_at(s: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(pieces, separators) of a split at a pattern outside every bracket."""
    matches = list(pattern.finditer(s))
    if not matches:
        return [s.strip()], []
    pieces, separators, start, depth = [], [], 0, depths(s)
    for match in matches:
        if depth[match.start()] == 0:
            pieces.append(s[start : match.start()].strip())
            separators.append(match.group())
            start = match.end()
    return [*pieces, s[start:].strip()], separators


def closing(s: str) -> int:
    """Index of the bracket that closes the one at 0, or -1."""
    depth = 0
    for i, char in enumerate(s):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return i
    return -1


def unwrap(s: str) -> str:
    """Drop outer braces and parentheses that group nothing but the whole; tuples keep theirs."""
    s = s.strip()
    for _ in range(MAX_LAYERS):
        if len(s) < 3 or (s[0], s[-1]) not in (("{", "}"), ("(", ")")) or closing(s) != len(s) - 1:
            break
        if s[-2] == "\\" or (s[0] == "(" and len(split_top(_OR.sub("", s[1:-1]), ",;")) > 1):
            break
        s = s[1:-1].strip()
    return s


# --- what stands in them ---------------------------------------------------------------------------------------------


def bracketed_items(s: str) -> list[str]:
    """Two items or more in round or square brackets."""
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and closing(s) == len(s) - 1:
        items = split_top(s[1:-1], ",;")
        return items if len(items) >= 2 else []
    return []


def set_items(s: str) -> list[str] | None:
    """Members of a set or a union of sets; None of everything else."""
    pieces = split_at(s, CUP)[0]
    if len(pieces) > 1:
        members = [set_items(piece) for piece in pieces]
        return None if None in members else list(itertools.chain(*(m for m in members if m)))
    m = re.fullmatch(r"\\\{(.*)\\\}", s, re.S)
    if not m or closing(s[1:]) != len(s) - 2 or "|" in m[1] or (":" in m[1] and OPERATOR.search(m[1])):
        return None
    return list_items(m[1])


def in_alphabet(names: list[str]) -> list[int]:
    """The order in which values of such names make a tuple: letters that follow each other (x, y; x_1, x_2) by the
    alphabet, others (n, a; r, theta) as they are written."""
    places = [_place(name.strip()) for name in names]
    alphabets = {place[0] for place in places}
    numbers = sorted(place[1] for place in places)
    in_a_row = len(alphabets) == 1 and numbers == list(range(numbers[0], numbers[0] + len(names)))
    return sorted(range(len(names)), key=lambda i: places[i][1] if in_a_row else i)


def _place(name: str) -> tuple[str, int]:
    """(alphabet, place) of a letter; x_1, x_2 are an alphabet of their own, and so is every other name."""
    m = re.fullmatch(r"\\?([A-Za-z]+)(?:_\{?(\d{1,3})\}?)?", name)
    if m and m[2]:
        return m[1], int(m[2])
    if m and m[1] in GREEK:
        return "greek", GREEK.index(m[1])
    return ("", ord(name)) if len(name) == 1 else (f"{name} ", 0)


def list_items(s: str) -> list[str]:
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
        values, order = [value.strip() for _, value in pairs], in_alphabet(names[:width])
        items = [f"({', '.join(values[i + j] for j in order)})" for i in range(0, len(values), width)]
    return items
