r"""What a question says about an answer to it: whether it is copied from there, and whether percents are asked for.

Copying is not answering. An answer is refused that stands in the question as a formula, in this or another order, is
no plain number and is not spelled as the gold is: always when the gold is a number or a constant ("3+4\cdot 5" for
23), and when it is longer than the gold where that has variables ("2(x+1)-x" for x+2). An equation that has a number
as one of its sides ("3+4\cdot 5=23") is computed, but none that the gold has solved ("2x+5y=3" for y = (3-2x)/5).
"""

from __future__ import annotations

import functools
import re

from megatron_t1.reward.answers.kinds import Answer, Number, Quantity, Relation, Words
from megatron_t1.reward.answers.normalize import compact, normalize
from megatron_t1.reward.answers.numbers import exact_number

MAX_QUESTION_CHARS = 8000
"""Only the end of a longer question is read."""
_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|[A-Za-z]|[^\s{}()\[\]]")
_SIDES = re.compile(r"=|\\approx(?![a-zA-Z])")
_NOTHING = {"\\cdot", "\\times", "\\text"}
_MIRRORED = {">": "<", "\\ge": "\\le"}
_FORMULA = re.compile(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_PERCENT_ASKED = re.compile(
    r"\b(?:what|find|which|as an?|in|by|nearest(?: \w+)?|express\w*)\s+(?:is\s+)?(?:the\s+)?(?:[^\W\d]+\s+){0,2}percent"
    r"|百分之几|百分比是",
    re.I,
)


def asks_for_percent(question: str) -> bool:
    """Whether 50% and 50 are the same answer to it."""
    return bool(_PERCENT_ASKED.search(question[-MAX_QUESTION_CHARS:]))


def is_copied(gold: Answer, answer: Answer, question: str) -> bool:
    """Whether a right answer is a formula of the question that the gold has worked out."""
    if not question or answer.key == gold.key or isinstance(gold, Words):  # "true or false?" has both
        return False
    if isinstance(gold, Relation) and isinstance(answer, Relation) and gold.value and not answer.value:
        return _stands_in(question, _tokens(answer.text))
    sides = _SIDES.split(answer.text)
    if any(exact_number(side) or compact(side) == gold.key for side in sides):
        return False
    if isinstance(answer, Quantity) and isinstance(answer.value, Number):
        return False
    tokens = max(map(_tokens, sides), key=len)
    if len(tokens) < 2 or not (_is_constant(gold.text) or len(tokens) > len(_tokens(gold.text))):
        return False
    if _operands(tokens) == _operands(_tokens(gold.text)):  # \pi/2 for \frac{\pi}{2}: nothing is left to work out
        return False
    return _stands_in(question, tokens)


def _stands_in(question: str, tokens: list[str]) -> bool:
    """As they are, or in another order as a formula or a side of one."""
    whole, formulas = _formulas(question[-MAX_QUESTION_CHARS:])
    return f" {' '.join(tokens)} " in whole or " ".join(sorted(tokens)) in formulas


def _is_constant(gold: str) -> bool:
    r"""12, \frac{\pi}{4}, 2\sqrt{3}, x=7: no variable but in front of an equals sign."""
    value = re.sub(r"\\(?:text\{[^{}]*\}|[a-zA-Z]+)", "", gold.split("=")[-1])
    return not re.search(r"[A-Za-df-hj-z]", value)


def _operands(tokens: list[str]) -> list[str]:
    return sorted(token for token in tokens if token not in ("\\frac", "/"))


def _tokens(text: str) -> list[str]:
    return [_MIRRORED.get(token, token) for token in _TOKEN.findall(text) if token not in _NOTHING]


@functools.lru_cache(maxsize=64)
def _formulas(question: str) -> tuple[str, set[str]]:
    """A question's tokens, spaced; and those of its formulas and of their sides, sorted."""
    sides: set[str] = set()
    for formula in _FORMULA.finditer(question):
        spelled = normalize(next(group for group in formula.groups() if group is not None))
        for side in (spelled, *re.split(r"[=<>,]|\\[gl]e(?![a-zA-Z])", spelled)):
            sides.add(" ".join(sorted(_tokens(side))))
    return f" {' '.join(_tokens(normalize(question)))} ", sides
