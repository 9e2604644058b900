r"""What a question says about an answer to it: whether it is copied from there, and what it asks for:
percents, digits in a base, a value or its reciprocal.

Copying is not answering. An answer is refused that stands in the question as a formula, in this or another order, is
no plain number and is not spelled as the gold is: always when the gold is a number or a constant ("3+4\cdot 5" for
23), and when it is longer than the gold where that has variables ("2(x+1)-x" for x+2). An equation that has a number
as one of its sides ("3+4\cdot 5=23") is computed, but none that the gold has solved ("2x+5y=3" for y = (3-2x)/5).
"""

from __future__ import annotations

import functools
import re

from megatron_t1.reward.answers.extract import FORMULA
from megatron_t1.reward.answers.kinds import Answer, Number, Quantity, Relation, Words
from megatron_t1.reward.answers.normalize import compact, normalize
from megatron_t1.reward.answers.notations import BASES, in_base
from megatron_t1.reward.answers.numbers import exact_number
from megatron_t1.reward.answers.words import NUMBER_WORDS

MAX_QUESTION_CHARS = 8000
"""Only the end of a longer question is read."""
_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|[A-Za-z]|[^\s{}()\[\]]")
_SIDES = re.compile(r"=|\\approx(?![a-zA-Z])")
_NOTHING = {"\\cdot", "\\times", "\\text"}
_MIRRORED = {">": "<", "\\ge": "\\le"}
_PERCENT_ASKED = re.compile(
    r"\b(?:what|find|which|as an?|in|by|nearest(?: \w+)?|express\w*)\s+(?:is\s+)?(?:the\s+)?(?:[^\W\d]+\s+){0,2}percent"
    r"|百分之几|百分比是",
    re.I,
)
_ASKED_BASE = re.compile(r"\bbase[- ]*[${]*(\w+)|\b(binary|octal|hexadecimal)\b", re.I)
_OTHER_QUANTITY = re.compile(
    r"(?:\\text\{)?\s*(?:(?:the|its|their|an?)\s+)?(?:(?:multiplicative|additive|natural|common)\s+)?"
    r"(square|cube|reciprocal|inverse|opposite|negation|logarithm|half|double|twice|square root|cube root)s?"
    r"(?:\s+of\s+(?:it|this|that|the\s+(?:answer|result|value|number|solution))(?![a-z])|\s*\}?\s*(?:(?:is|are|equals?)\b|[:=}])(?=.*\w))",
    re.I,
)


def asks_for_percent(question: str) -> bool:
    """Whether 50% and 50 are the same answer to it."""
    return bool(_PERCENT_ASKED.search(question[-MAX_QUESTION_CHARS:]))


def same_in_asked_base(gold: str, answer: str, question: str) -> bool:
    """204 for 204_5, or the other way round, where the last base of the question is 5."""
    of_gold, of_answer = in_base(gold), in_base(answer)
    if (of_gold is None) == (of_answer is None) or not (asked := list(_ASKED_BASE.finditer(question))):
        return False
    digits, _, base = (of_gold or of_answer or "").rpartition("_")
    named = (asked[-1][1] or asked[-1][2]).casefold()
    plain = answer if of_gold else gold
    return plain.strip().upper() == digits and base == BASES.get(named, NUMBER_WORDS.get(named, named))


def names_another_quantity(answer: str, *known: str) -> bool:
    """Whether an answer says what it is, and that is another thing than asked: "its reciprocal is 5", for 5.

    `known` are the texts, gold and question, of which one asks for it if it has the word.
    """
    named = _OTHER_QUANTITY.match(answer)
    return named is not None and not any(named[1].casefold() in text.casefold() for text in known)


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
    for formula in FORMULA.finditer(question):
        spelled = normalize(formula[formula.lastindex or 0])
        for side in (spelled, *re.split(r"[=<>,]|\\[gl]e(?![a-zA-Z])", spelled)):
            sides.add(" ".join(sorted(_tokens(side))))
    return f" {' '.join(_tokens(normalize(question)))} ", sides
