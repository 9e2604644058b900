"""browse.html: some kept and some left-out questions with all their stages, to read before training on them.

The page is static and asks no other host for anything; what models wrote is escaped text.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_t1.files import write_text
from megatron_t1.report.html import render


def write(path: Path, rows: Iterable[dict[str, Any]], summary: dict[str, Any], num_shown: int) -> None:
    """The first `num_shown` / 2 kept questions and as many left-out ones."""
    kept: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for row in rows:
        chosen = kept if row["dropped"] is None else left_out
        if len(chosen) < num_shown // 2:
            chosen.append(row)
    write_text(path, render("browse.html.j2", rows=[*kept, *left_out], summary=summary))
