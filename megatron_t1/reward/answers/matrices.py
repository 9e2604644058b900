r"""Matrices, as rows of texts: one, or sums, multiples and products of some, written out cell by cell."""

from __future__ import annotations

import re

MAX_CELLS = 64
MAX_CELL_CHARS = 2000
"""Of a cell written out: every factor of a product makes it longer by as much as it has rows."""
_Cells = list[list[str]]
_MATRIX = re.compile(
    r"\[?\s*\\begin\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\begin).)*?)\\end\{[a-zA-Z]+\}\s*\]?",
    re.S,
)
_COLUMN = re.compile(r"((?:^|[-+\d})\s]|(?<![\\A-Za-z])[a-eik-z])\s*)\(([^(),]+(?:,[^(),]+)+)\)")
_COMBINATION = re.compile(r"(?:\\(?:frac|sqrt|cdot|pi)(?![a-zA-Z])|(?<![\\a-zA-Z])[a-z](?![a-z])|[-+\d\s/{}])*")
"""What may stand around (1,0,2) + t(3,1,-1)."""


def matrix_cells(s: str) -> _Cells | None:
    """The cells of the matrix that a text is; None when it is none, or too large."""
    if "\\begin" not in s:
        if s.startswith("[") and ";" in s and (m := re.fullmatch(r"\[([^\[\]]*)\]", s)):  # [1, 2; 3, 4]
            rows = [row.split(",") for row in m[1].split(";")]
            return rows if 1 < len(rows[0]) == len(rows[-1]) else None
        if "(" not in s or "," not in s or (s[0] == "(" and s.find(")") == len(s) - 1):
            return None
        s = _COLUMN.sub(lambda m: rf"{m[1]}\begin{{matrix}}{m[2].replace(',', chr(92) * 2)}\end{{matrix}}", s)
        around = _MATRIX.sub("", s)
        if around == s or not around.strip() or not _COMBINATION.fullmatch(around):
            return None
    total: _Cells | None = None
    product: _Cells | None = None
    start = 0
    for m in _MATRIX.finditer(s):
        before, cells = s[start : m.start()].strip(), _cells(m[1])
        start = m.end()
        if not cells or sum(map(len, cells)) > MAX_CELLS or re.search(r"[=<>,;&]|\\det", before):
            return None
        if product is not None and re.fullmatch(r"(?:\\cdot|\\times)?", before):
            product = _product(product, cells)
        else:
            if product is not None and (before[0] not in "+-" or (total := _sum(total, product)) is None):
                return None
            product = [[_times(before, cell) for cell in row] for row in cells]
        if product is None or max(len(cell) for row in product for cell in row) > MAX_CELL_CHARS:
            return None
    return None if product is None or s[start:].strip() else _sum(total, product)


def _cells(inside: str) -> _Cells:
    rows = re.split(r"\\\\(?:\[[^\]]*\])?", inside)
    return [[cell.strip() for cell in row.split("&")] for row in rows if row.strip()]


def _times(factor: str, cell: str) -> str:
    factor = re.sub(r"\\(?:cdot|times)\s*$", "", factor.removeprefix("+")).strip()
    if factor in ("", "-"):
        return f"-({cell})" if factor else cell
    return f"({factor})\\cdot ({cell})"


def _sum(left: _Cells | None, right: _Cells) -> _Cells | None:
    if left is None:
        return right
    if [len(row) for row in left] != [len(row) for row in right]:
        return None
    return [[f"({a})+({b})" for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def _product(left: _Cells, right: _Cells) -> _Cells | None:
    if any(len(row) != len(right) for row in left) or len({len(row) for row in right}) != 1:
        return None
    columns = list(zip(*right, strict=True))
    return [
        ["+".join(f"({a})\\cdot ({b})" for a, b in zip(row, column, strict=True)) for column in columns] for row in left
    ]
