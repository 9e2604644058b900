r"""The kinds of answers that read.py makes of texts.

What can be read in two ways keeps both: "(1, 2)" is a tuple and an interval, "x > 3" a relation and a region, "1,200" a
number and a list.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from megatron_t1.reward.answers.latex import parse_latex
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.numbers import Exact
from megatron_t1.reward.answers.quantities import Unit
from megatron_t1.reward.answers.trees import rational


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
    """A text, or a name of points."""


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
    """After midnight; or after noon, where the half isn't said."""
    half: str
    """Of the day, "a" or "p"; "24" where the hour says it (22:24, 0:30), '' when it isn't said."""


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
