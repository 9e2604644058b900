"""Whether an answer can serve as a gold."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from megatron_t1.reward.answers.kinds import (
    Answer,
    Approximation,
    Expression,
    Interval,
    List,
    Literal,
    Matrix,
    Quantity,
    Ratio,
    Region,
    Relation,
    Set,
    Tuple,
    Words,
)
from megatron_t1.reward.answers.read import read
from megatron_t1.reward.answers.tokens import NO_MATHEMATICS, UndecidableError
from megatron_t1.reward.answers.verify import normalized_gold, verify
from megatron_t1.reward.answers.words import words

MAX_GOLD_CHARS = 200
MAX_TEXT_WORDS = 4
"""Longer text answers are sentences, which have too many spellings."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{4,}")
_NAMED_VALUES = ("\\emptyset", "\\mathbb{R}", "\\mathbb{Z}", "\\mathbb{N}")


def gold_problem(gold: str) -> str | None:
    """Why an answer cannot serve as a gold; None when it can. For workers."""
    if len(gold) > MAX_GOLD_CHARS:
        return f"longer than {MAX_GOLD_CHARS} characters"
    itself = verify(gold, rf"\boxed{{{gold}}}")
    if itself.outcome != "correct":
        return f"it is not accepted as its own answer: {itself.reason}"
    try:
        check_readable(read(normalized_gold(gold, "response")))
    except NO_MATHEMATICS as error:
        return f"it cannot be compared: {error or type(error).__name__}"[:200]
    return None


def check_readable(answer: Answer) -> None:
    """Whether `equal` can compare this answer with other spellings of it, and not as a string alone.

    Raises:
        UndecidableError: some part of it is no number, short text or expression; the message names the part.
    """
    parts: Iterable[Answer] = ()
    match answer:
        case Tuple(items=parts) | Set(items=parts) | List(items=parts):
            pass
        case Ratio(parts=parts) | Relation(sides=parts) | Region(intervals=parts):
            pass
        case Interval(low=low, high=high):
            parts = low, high
        case Matrix(rows=rows):
            parts = itertools.chain(*rows)
        case Approximation(exact=exact, rounded=rounded):
            parts = exact, *rounded
        case Quantity(value=value):
            parts = (value,)
        case Literal() if answer.problem:
            raise UndecidableError(f"{answer.text[:60]!r} is {answer.problem}")
        case Words() | Literal() | Expression() if isinstance(answer, Words) or _WORD.search(answer.text):
            if sum(word[-1].isalnum() for word in words(answer.text).split()) > MAX_TEXT_WORDS:
                raise UndecidableError(f"a sentence: {answer.text[:60]!r}")
        case Expression() if answer.text.strip("+- ") not in _NAMED_VALUES:
            _ = answer.tree
    for part in parts:
        check_readable(part)
