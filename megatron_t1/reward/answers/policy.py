"""Where people differ about what is equal: the choices that a user has. docs/grading.md has the rules for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, frozen=True)
class EqualityConfig:
    """Which answers count as equal where people differ."""

    units: Literal["optional", "required"] = "optional"
    """Whether an answer may leave out the gold's unit (5 for 5 m). Another unit is converted or wrong in any case; a
    counted noun (5 apples) may always be left out."""
    percent: Literal["asked", "either", "exact"] = "asked"
    """50% is 0.5. `asked`: a gold 50% also takes 50, and a gold 50 takes 50% where the question asks for percent;
    `either`: both always, as Qwen2.5-Math's evaluation does; `exact`: neither."""
    rounding: bool = True
    """Whether a decimal takes, or is, what rounds to it: 3.14 and 3.14159, 85.71 for 600/7. False: the same number."""
    strict_ends: bool = True
    """Whether open and closed ends differ: (1,2) and [1,2], x < 1 and x <= 1."""


DEFAULT = EqualityConfig()
