r"""What stands around a value: a clause behind it that says what its parameters are, a label in front of it.

"k\pi, k \in \mathbb{Z}" is a value with its parameter's kind. Such a clause may be left out, but two that say
different things are two answers; a clause that is not understood ("for some, 6 for others") is never cut off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_t1.reward.answers.brackets import OPERATOR
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.relations import INEQUALITY
from megatron_t1.reward.answers.words import is_prose


@dataclass(frozen=True)
class Clause:
    """What a clause says of the letters in it."""

    names: tuple[str, ...]
    domain: str = ""
    """Z, Q, R or C; '' when it isn't said."""
    sign: str = ""
    """Which of those: "+", "0+", "*", "N" (positive, with or without 0), a bound or an interval; '' for all."""

    @property
    def counts(self) -> bool:
        """Whether it lists whole numbers, of which an answer without it would leave open which."""
        return re.match(r"\d+(?:,| to )", self.sign) is not None

    def clashes(self, other: Clause) -> bool:
        """Whether both say something, and not the same."""
        if "" in (self.domain + self.sign, other.domain + other.sign):
            return False
        if self.domain and other.domain and self.domain != other.domain:
            return True
        return self.sign != other.sign and not (
            "N" in (self.sign, other.sign) and {"+", "0+"} & {self.sign, other.sign}
        )


_LETTER = r"(?:[a-zA-Z]|\\[a-z]{2,7})(?:_\{?\w{1,3}\}?)?(?![a-zA-Z])"
_LETTERS = rf"{_LETTER}(?:\s*,\s*(?:\\land\s*)?{_LETTER}){{0,3}}"
_SET = (
    r"\\in\s*(?:\\math(?:bb|bf|rm)|\\text)?\s*\{?(?P<set>[ZNRQC])\}?"
    r"(?P<which>(?:\\cdot|\\g(?:e|t)(?![a-z])|[_^+*{}>0\s])*)"
)
_BOUND = r"(?P<operator>\\[lg]e|\\ne|[<>])\s*(?P<bound>-?\d{1,3})"
_INTERVAL = r"\\in\s*(?P<interval>[(\[][^()\[\]]{1,30},[^()\[\]]{1,30}[)\]])"
_COUNTED = r"=\s*(?P<counted>\d+(?:\s*,\s*(?:\\land\s*)?(?:\d+|\\ldots|[a-z](?:-1)?))+)"
_FACT = re.compile(rf"(?:{_SET}|{_BOUND}|{_COUNTED}|{_INTERVAL})\s*$")
_WORDED = re.compile(
    r",?\s*\(?\s*(?:\\text\{[\s,(]*|(?<![a-zA-Z{]))"
    r"(?:with\b|for\b(?P<all> (?:all|any|every|each|some)\b)?|(?P<where>where\b))"
)
_BARE = re.compile(
    rf"(?:[,(]\s?\(?\s?(?P<letters>{_LETTERS})|\s\(?(?P<letter>{_LETTER}))\s?(?:{_SET}|{_BOUND}|{_COUNTED})\s?\)?$"
)
_INDEX = re.compile(r"[kmn]\s*(?:\\ge\s*[01]|>\s*0)")
_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=[a-z-]{2})")
_WORD = re.compile(rf"\\[a-z]+|[A-Za-z-]{{2,}}|{_LETTER}|[^\s,()]")
_SAYS = {
    "integer": ("Z", ""), "real": ("R", ""), "rational": ("Q", ""), "complex": ("C", ""), "natural": ("Z", "N"),
    "whole": ("Z", "N"), "positive": ("", "+"), "nonnegative": ("", "0+"), "non-negative": ("", "0+"),
    "nonzero": ("", "*"), "non-zero": ("", "*"),
}  # fmt: skip
"""(domain, sign) of a clause with such a word."""
_SAYS_NOTHING = {
    "for", "where", "with", "all", "any", "every", "each", "some", "is", "are", "be", "number", "constant", "parameter",
    "value", "arbitrary", "fixed", "and", "\\land",
}  # fmt: skip
_DEFINED = re.compile(
    rf"\s*,?\s*where\s+({_LETTER})\s+(?:is|denotes)\s+(?:an?|the)\s+((?:[a-z-]{{1,20}}\s+){{0,5}}[a-z-]{{1,20}})\s*"
)
_RESTRICTS = {*_SAYS, "even", "odd", "prime", "other"}
_FOR_EACH = re.compile(r"\s*,?\s*for (?:each|every)((?:\s+[a-z-]{2,20}){0,3})\s*")
_BUILDER = re.compile(r"\\\{([^|:]+)[|:]([^|:]+)\\\}(\s*\)?)")
_LEADS_TO_SET = re.compile(r"^$|(?:[=:(]|\bis|\\text\{[^{}]*\})\s?$")


def without_clause(s: str) -> tuple[str, Clause | None]:
    """(value, what its clause says); the text as it is, and None, when it has none.

    Raises:
        ValueError: its clause is not understood.
    """
    at = max(s.find("\\{"), 0)
    if (built := _BUILDER.fullmatch(s, at)) and _LEADS_TO_SET.search(s[:at]):
        clause = _understood(built[2])
        if clause and clause.domain and not OPERATOR.search(built[1]):
            return s[:at] + built[1].strip() + built[3], clause
    worded = _WORDED.search(s)
    if worded and (value := s[: worded.start()].strip()):
        if clause := _understood(s[worded.start() :]):
            return value, clause
        if worded["all"] or worded["where"]:
            raise ValueError("a clause that is not understood")
    bare = _bare(s)
    if bare and (value := s[: bare.start()].strip()):
        tail = bare[0].strip(" ,()")
        letter, formula = bare["letters"] or bare["letter"], re.sub(r"\\[a-z]+", "", value)
        counts = (
            bare["counted"] and letter in formula and not re.search(rf"(?<![A-Za-z]){re.escape(letter)}\s*=", value)
        )
        if (bare["set"] or counts or _begins(tail, value)) and (clause := _understood(tail)):
            return value, clause
    return s, None


def _bare(s: str) -> re.Match[str] | None:
    r"""A clause without words. The first n of "n, n \in \mathbb{Z}" is no parameter but the value."""
    bare = _BARE.search(s)
    while bare and bare["letters"] and len(set(letters := re.findall(_LETTER, bare["letters"]))) < len(letters):
        bare = _BARE.search(s, bare.start() + 1)
    return bare


def _begins(bound: str, value: str) -> bool:
    r"""Whether n \ge 1 tells where a sequence begins: x \ge 1 may be half of a region."""
    return bool(_INDEX.fullmatch(bound)) and not INEQUALITY.search(value)


def parted(s: str) -> tuple[str, Clause | None]:
    """As `without_clause`; a clause that is not understood is part of the value."""
    try:
        return without_clause(s)
    except ValueError:
        return s, None


def _understood(tail: str) -> Clause | None:
    tail = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", tail).strip(" .")
    tail = tail.removesuffix(")") if tail.count(")") > tail.count("(") + tail.count("[") else tail
    if (defined := _DEFINED.fullmatch(tail)) and not is_prose(_ARTICLE.sub("", defined[2]), _RESTRICTS):
        return Clause((defined[1],))
    if (each := _FOR_EACH.fullmatch(tail)) and not is_prose(each[1], _RESTRICTS):
        return Clause(())
    fact = _FACT.search(tail)
    facts = [_of_fact(fact)] if fact else []
    names, words = [], set()
    for word in _WORD.findall(_ARTICLE.sub("", tail[: fact.start()] if fact else tail)):
        kind = word.casefold() if word in _SAYS_NOTHING else word.casefold().removesuffix("s")
        if kind in _SAYS:
            facts.append(_SAYS[kind])
        elif kind not in _SAYS_NOTHING:
            names.append(word)
        words.add(kind)
    domains, signs = ({each[i] for each in facts} - {""} for i in (0, 1))
    if not all(re.fullmatch(_LETTER, name) for name in names) or len(domains) > 1 or len(signs) > 1:
        return None
    if not names and (fact or "some" in words or not domains):  # for all real numbers
        return None
    return Clause(tuple(names), "".join(domains), "".join(signs)) if len(names) <= 4 else None


def _of_fact(fact: re.Match[str]) -> tuple[str, str]:
    r"""(domain, sign) that a formula says: k \in \mathbb{Z}^+, n \ge 1, n = 1, 2, \ldots"""
    if letter := fact["set"]:
        which = fact["which"]
        if "\\cdot" in which or "*" in which:
            sign = "+" if letter == "N" else "*"
        elif "0" in which and ("\\ge" in which or letter == "N") and ">" not in which:
            sign = "0+"
        else:
            sign = "+" if re.search(r"\+|>|\\g", which) else "N" if letter == "N" else ""
        return "Z" if letter == "N" else letter, sign
    if counted := fact["counted"]:
        numbers = re.sub(r"\\land|\s", "", counted).split(",")
        if numbers[-1] == "\\ldots" and numbers[0] in "01":
            return "Z", "0+" if numbers[0] == "0" else "+"
        in_a_row = numbers == [str(int(numbers[0]) + i) for i in range(len(numbers))]
        return "Z", f"{numbers[0]} to {numbers[-1]}" if in_a_row or "\\ldots" in numbers else ",".join(numbers)
    if interval := fact["interval"]:
        return "R", compact(interval)
    at = fact["operator"] + fact["bound"]
    sign = {"\\ge0": "0+", ">0": "+", "\\ge1": "+"}.get(at, at)
    return "Z" if at == "\\ge1" else "", sign
