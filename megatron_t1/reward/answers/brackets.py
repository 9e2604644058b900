"""Splitting normalised answers outside their brackets. Intervals mix bracket shapes, so all shapes count alike."""

from __future__ import annotations

import re

JOINT = re.compile(r"^\s*\\(?:land|lor)(?![a-zA-Z])\s*")
"""What `normalize` leaves, after a comma, of an "and" or an "or"."""
_OPEN, _CLOSE = "([{", ")]}"
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
    return [piece for piece in (JOINT.sub("", p) for p in pieces) if piece]


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
        if s[-2] == "\\" or (s[0] == "(" and len(split_top(s[1:-1], ",;")) > 1):
            break
        s = s[1:-1].strip()
    return s
