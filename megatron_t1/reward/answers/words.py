r"""Words in answers, English and Chinese: which are text, numbers, negations, or more than the name of a thing."""

from __future__ import annotations

import re

CJK = r"[\u3040-\u30ff\u4e00-\u9fff]+"
_OTHER_WORDS = """
half halves third thirds quarter quarters
or and nor but not no non never isn't is are was were be been am equals equal at least most more less fewer
greater smaller larger bigger higher lower than over under above below up down about around maybe perhaps
probably possibly approximately roughly almost nearly wrong incorrect false true right correct squared cubed
root point times plus minus divided multiplied by mod modulo to too from if when where for with without which
that then else otherwise unless except only between either neither cannot can could might may must should would
some both zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
factorial double twice triple thrice inverse negative positive power base binary hexadecimal the a an it as so
because since instead rather actually wait unknown undefined
"""
NOT_COUNTED = set(_OTHER_WORDS.split())
"""Words that are not counted: no nouns."""
NEGATION = re.compile(
    r"(?<![a-z])(?:not|never|no|none|neither|nor|except|cannot|isn't|non)(?![a-z])|[不没非未无]|至少|至多", re.I
)
_SHORT_WORDS = {"yes", "no", "odd", "dne", "all", "sat", "sun", "mon", "tue", "wed", "thu", "fri"}
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UP_TO_9 = ("", *_SMALL.split()[1:10])
_ENGLISH = [*_SMALL.split(), *(f"{ten} {one}".strip() for ten in _TENS.split() for one in _UP_TO_9)]
_DIGITS = "零一二三四五六七八九"
_CHINESE = [*_DIGITS, *(f"{ten}十{one}" for ten in ("", *_DIGITS[2:]) for one in ("", *_DIGITS[1:]))]
NUMBER_WORDS = {word: str(n) for names in (_ENGLISH, _CHINESE) for n, word in enumerate(names)} | {"两": "2"}
"""Words of the numbers below 100."""
_JOINTS = re.compile(r"\\(?:land|lor)(?![a-zA-Z])")
_STOP_WORDS = {"the", "a", "an", "is", "are"}


def words(s: str) -> str:
    """Plain words of a text answer, for comparison."""
    s = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", _JOINTS.sub("", s))
    s = re.sub(r"\b([a-z])\.\s?([a-z])\.", r"\1\2", s.casefold())  # p.m., i.e.
    s = re.sub(r"[^\w\s]", " ", s)
    return " ".join(w for w in s.split() if w not in _STOP_WORDS) or s.strip()


def is_text(s: str) -> bool:
    r"""Words, not mathematics: all \text{...}, capital letters naming points, or words of four letters and more."""
    s = _JOINTS.sub("", s)
    if s.casefold() in _SHORT_WORDS or s.casefold().replace("-", " ") in NUMBER_WORDS:
        return True
    outside = re.sub(r"\\text\{[^{}]*\}", "", s)
    if (outside != s and not re.search(r"[A-Za-z0-9\\]", outside)) or re.fullmatch(CJK, s):
        return True
    return bool(re.fullmatch(r"[A-Z]{2,}|(?:[A-Za-z]{2,}[ ,.\-]+)*(?:[A-Za-z]{4,}|[A-Z][a-z]{2,})", s.strip("() ")))


def is_prose(text: str) -> bool:
    """Whether words are more than names of things: "or more", "is wrong"."""
    return any(len(word) > 1 and word in NOT_COUNTED for word in re.findall(r"[a-z']+", text.casefold()))
