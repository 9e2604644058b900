r"""Words in answers, English and Chinese: which are text, numbers, negations, or more than the name of a thing."""

from __future__ import annotations

import re
from collections.abc import Set

CJK = r"[\u3040-\u30ff\u4e00-\u9fff]+"
JOINT = re.compile(r"\\(?:land|lor)(?![a-zA-Z])")
"""What `normalize` leaves, after a comma, of an "and" or an "or"."""
_OTHER_WORDS = """
half halves third thirds quarter quarters
or and nor but not no non never isn't is are was were be been am equals equal at least most more less fewer
greater smaller larger bigger higher lower than over under above below up down about around maybe perhaps
probably possibly approximately roughly almost nearly wrong incorrect false true right correct squared cubed
root point times plus minus divided multiplied by mod modulo to too from if when where for with without which
that then else otherwise unless except only between either neither cannot can could might may must should would
some both zero factorial double twice triple thrice inverse negative positive power base binary hexadecimal the a an
it as so because since instead rather actually wait unknown undefined k kilo complement
"""
_OPERATIONS = "sin cos tan cot sec csc log ln exp lim sqrt abs floor ceil gcd lcm square cube every each all"
OPERATIONS = set(_OPERATIONS.split())
"""Words that do something to the value behind them."""
NEGATION = re.compile(
    r"(?<![a-z])(?:not|never|no|none|neither|nor|except|cannot|isn't|non)(?![a-z])|[不没非未无]|至少|至多", re.I
)
_SHORT_WORDS = {"yes", "no", "odd", "dne", "all", "sat", "sun", "mon", "tue", "wed", "thu", "fri"}
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL_NUMBERS = (*_SMALL.split()[1:], *_TENS.split())
_UP_TO_9 = ("", *SMALL_NUMBERS[:9])
_ENGLISH = [*_SMALL.split(), *(f"{ten} {one}".strip() for ten in _TENS.split() for one in _UP_TO_9)]
_ENGLISH += [f"{n} hundred {rest}".strip() for n in _UP_TO_9[1:] for rest in ("", *_ENGLISH[1:])]
_DIGITS = "零一二三四五六七八九"
_CHINESE = [*_DIGITS, *(f"{ten}十{one}" for ten in ("", *_DIGITS[2:]) for one in ("", *_DIGITS[1:]))]
_AFTER_100 = ["", *(f"零{n}" for n in _DIGITS[1:]), *("一" * (n < 20) + _CHINESE[n] for n in range(10, 100))]
_CHINESE += [f"{n}百{rest}" for n in _DIGITS[1:] for rest in _AFTER_100]
NUMBER_WORDS = {word: str(n) for names in (_ENGLISH, _CHINESE) for n, word in enumerate(names)} | {"两": "2"}
"""Words of the numbers below 1000."""
_ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
PARTS = {"half": 2, "halve": 2, "quarter": 4}
PARTS |= {word: n for n, word in enumerate([*_ORDINALS.split(), *(f"{n}th" for n in SMALL_NUMBERS[12:19])], 3)}
PARTS |= {f"{ten[:-1]}ieth": 10 * n for n, ten in enumerate(_TENS.split(), 2)}
"""Words of parts, with how many of them are a whole."""
NOT_COUNTED = {*_OTHER_WORDS.split(), *SMALL_NUMBERS}
"""Words that are not counted: no nouns."""
_FIRST_WORD = re.compile(r"-?\s*(?:\\text\{\s*)?(?:a |[A-Za-z]{3,})|-?[零一二三四五六七八九十百两]")
_CHINESE_NUMBER = re.compile(rf"(-?)([{_DIGITS}十百两]+)(?:分之([{_DIGITS}十百两]+)|([个种次天人位条张元岁]?))")


def in_digits(s: str) -> str:
    """A number in words, and what it counts, with digits: 21 for twenty-one, 2/3 for two thirds, 3/8 for 八分之三."""
    if not _FIRST_WORD.match(s):
        return s
    bare = re.sub(r"^(-?)\s*\\text\{([^{}]*)\}$", r"\1\2", s).strip()
    if m := _CHINESE_NUMBER.fullmatch(bare):
        number, above = NUMBER_WORDS.get(m[2]), NUMBER_WORDS.get(m[3])
        if m[2] == "百" and above:  # 百分之二十五
            return f"{m[1]}{above}%"
        if number is None or (m[3] and above is None):
            return s
        return m[1] + (f"{above}/{number}" if above else number + m[4])
    bare = re.sub(r"(?<=hundred) ?, \\land ", " ", bare, flags=re.I)
    tokens = bare.removeprefix("-").split()
    for k in range(min(len(tokens), 5), 0, -1):
        name = " ".join(tokens[:k]).replace("-", " ").casefold()
        above, _, part = name.rpartition(" ")
        number = NUMBER_WORDS.get(name)
        if name == "a" and k < len(tokens) and tokens[k].casefold() in ("dozen", "hundred", "thousand", "million"):
            number = "1"
        if name == "half" and tokens[1:2] in ([], ["a"], ["an"]):
            return f"1/2 {' '.join(tokens[2:])}".strip()
        if number is None and (above in NUMBER_WORDS or above == "a") and part.removesuffix("s") in PARTS:
            number = f"{NUMBER_WORDS.get(above, 1)}/{PARTS[part.removesuffix('s')]}"
        if number is not None:
            return " ".join(["-"[: bare.startswith("-")] + number, *tokens[k:]])
    return s


_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_]{2})|(?<=[^\W\d_]{2})-(?=[^\W\d_])")
"""Between the parts of a word: twenty-one, x-axis; no x - y, no Cl^-."""
_CHARGE = re.compile(r"\^\s*\{?(?=\d*[-+](?!\s*\d))")
"""Na^+ is Na+."""
_SIGNS = re.compile(r"(\\[a-z]+|[-+<>=/|#^]|(?<![a-z]{2})!|(?<![a-z]{3}):)|[^\w\s]")
"""Those that say something, as commands do; and what only divides: "Yes!", "Answer: 5", but no n! and no a:b."""
_STOP_WORDS = {"the", "a", "an", "is", "are"}


def words(s: str) -> str:
    """Plain words of a text answer, for comparison, and the signs among them: C++, Cl^-."""
    s = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", JOINT.sub("", s))
    s = re.sub(r"\b([a-z])\.\s?([a-z])\.", r"\1\2", s.casefold())  # p.m., i.e.
    s = _CHARGE.sub(" ", _HYPHEN.sub(" ", s))
    s = _SIGNS.sub(r" \1 ", s)
    s = re.sub(r"^\s*(?:it|this|that|the [a-z]+(?: [a-z]+)?) (?:is|are|was|will be) |条件\s*$", "", s)
    s = re.sub(r"(?<=[a-z]{4}) triangle\s*$", "", s)  # isosceles
    telling = [w for w in s.split() if w not in _STOP_WORDS]
    return " ".join(telling if any(len(w) > 2 and w.isalpha() for w in telling) else s.split())


def is_text(s: str) -> bool:
    r"""Words, not mathematics: all \text{...}, capital letters naming points, or words of four letters and more."""
    s = JOINT.sub("", s)
    if s.casefold() in _SHORT_WORDS or s.casefold().replace("-", " ") in NUMBER_WORDS:
        return True
    outside = re.sub(r"\\text\{[^{}]*\}", "", s)
    if (outside != s and not re.search(r"[A-Za-z0-9\\<>=]", outside)) or re.fullmatch(CJK, s):
        return True
    return bool(re.fullmatch(r"[A-Z]{2,}|(?:[A-Za-z]{2,}[ ,.\-]+)*(?:[A-Za-z]{4,}|[A-Z][a-z]{2,})", s.strip("() ")))


def is_prose(text: str, more: Set[str] = frozenset()) -> bool:
    """Whether words are more than names of things: "or more", "is wrong"."""
    return any(
        len(word) > 1 and (word in NOT_COUNTED or word in more) for word in re.findall(r"[a-z']+", text.casefold())
    )
