r"""Multiple choice: the one letter that a response settles on. A hedge chooses nothing."""

from __future__ import annotations

import re

from megatron_t1.reward.answers.extract import last_part, phrase

_LETTER = r"[(\[*$\s\"']*(?:\\text\{\s*\(?|\\mathrm\{|\\mathbf\{|\\textbf\{\s*\(?)?([A-J])(?![A-Za-z'’])\)?\}?"
_MC_ANCHOR = re.compile(
    r"(?:(?:therefore|thus|hence|actually|conclude|think|believe|\bit (?:has to|must) be)[,:\s]+"
    r"(?:(?:it|it's|that|that's|this|the|is|must|be|would|say|i|think|go|with|choose|answer|option|choice)\s+)*"
    r"|(?:answer|option|choice|choose|correct|select|r[ée]ponse|答案|选择|选)(?-i:[^.\n。A-J]){0,60}?"
    r"(?:\bis\b|\bare\b|\bbe\b|\best\b|[:：]|\b(?:answer|option|choice|choose|select)\b|是|为|选)[*\s]*"
    r"(?:definitely|for sure|clearly|probably|certainly|the|option|choice|surely)?\s*(?:option|choice)?\s*|选择?)"
    + _LETTER,
    re.I,
)
_BETWEEN_CHOICES = """
or and else alternatively unless it is if not that fails then to maybe perhaps possibly probably no otherwise also even
the option answer choice either could may might be both wait actually rather 或 和 及
"""
_GO_ON = set(_BETWEEN_CHOICES.split())
"""Words that lead from one choice to another one."""
_AFFIRMED = re.compile(r"(?<![A-Za-z])([A-J])\)?\s+(?:is|must be)\s+(?:the\s+)?(?:correct|right|true|answer|best)\b")
_DENIED = re.compile(
    r"(?:(?<!if )\b(?i:not|non|nor|neither|cannot)\b|n't\b|不是|不选|而非)\s*"
    r"(?:be\b|is\b|the\b|option\b|choice\b|answer\b|\s)*\(?[A-J]\b\)?"
    r"(?:\s*(?:,|\bor\b|\bnor\b|\band\b|或|和)\s*\(?[A-J]\b\)?)*"
    r"|\(?\b[A-J]\)?(?:\s*(?:,|\band\b)\s*\(?[A-J]\b\)?){0,9}\s+"
    r"(?:is|are|was|were|can|could)(?:\s+be)?\s*(?:not\b|n't\b|never\b|wrong\b|incorrect\b|false\b|invalid\b"
    r"|(?:ruled )?out\b|eliminated\b|excluded\b|impossible\b|too (?:large|small|big)\b)[^.;,。]*"
)
"""Letters that a text rules out, to be read without them."""
_NEGATED = re.compile(
    r"\b(?:not|neither|nor|never|wrong|incorrect|false|except|cannot|anything but|other than|rule out|eliminate)\b"
    r"|n't\b",
    re.I,
)
_UNSURE = re.compile(r"\b(?:could|might|may|maybe|perhaps|possibly|either)\b", re.I)
_MARKED_OPTION = re.compile(r"(?<![A-Za-z])([A-J])[).:]")
_LONE_LETTER = re.compile(r"(?<![A-Za-z'’\\])([B-HJ]|A(?!\s+(?!and\b|or\b)[a-z]))(?![A-Za-z'’])")
"""A letter on its own; "A triangle" is an article, "I" a person."""


def _is_hedged(chosen: str, rest: str) -> bool:
    """Whether the text behind a choice goes on to another one: "or C", "; C", "? No, C", "unless it is C"."""
    rest = re.sub(r"\\[a-z]+\s*\{|[}$*\"']", " ", rest)
    other = next((m for m in _LONE_LETTER.finditer(rest) if m[1] != chosen), None)
    if other is None:
        return False
    if re.match(r"\W*(?:only )?(?:if|unless|provided|assuming)\b", rest):
        return True
    between, behind = rest[: other.start()], rest[other.end() :]
    words = re.findall(r"[^\W\d_]+", between.casefold())
    if words:
        return _GO_ON.issuperset(words)
    if "\n" not in between and re.fullmatch(r"[\s()\[\].]*", between):
        return behind.startswith(")")
    return bool(re.search(r"[,;/|&?]", between)) or (
        bool(re.search(r"[-–\\]", between)) and not re.match(r"\s+[a-z]{2}", behind)
    )


def _one_letter(text: str) -> str | None:
    """A text that is nothing but one letter, in whatever wrapping; lower case counts only here."""
    bare = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text).strip(" \n\t()[]{}$*.:\"'`。")
    return bare.upper() if re.fullmatch(r"[A-Ja-j]", bare) else None


def _text_key(text: str) -> str:
    return re.sub(r"[\s.$*\\{}()]+", " ", re.sub(r"\\text|\\mathrm", "", text)).strip().casefold()


def _letter_of(meant: list[bool]) -> str | None:
    """Of the one option that is meant."""
    return "ABCDEFGHIJ"[meant.index(True)] if meant.count(True) == 1 and True in meant[:10] else None


def _match_choice(text: str, choices: tuple[str, ...]) -> str | None:
    return _letter_of([_text_key(choice) == _text_key(text) for choice in choices])


def _named_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The one option whose words stand in the text."""
    said, *options = (re.sub(r"\W+", " ", _text_key(t)).strip() for t in (text, *choices[:10]))
    return _letter_of([bool(option) and f" {option} " in f" {said} " for option in options])


def gold_letter(gold: str, choices: tuple[str, ...]) -> str | None:
    """The letter a gold stands for: itself, its option text, or the marked letter inside a sentence."""
    if letter := _one_letter(gold) or _match_choice(gold, choices):
        return letter
    marked = re.search(r"\(([A-J])\)", gold) or re.search(r"(?:^|\n)\s*([A-J])[\s.):]", gold)
    return marked.group(1) if marked else None


def chosen_letter(text: str, choices: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """(letter, where or why not) of a multiple-choice response. A hedge ("C or D", "not C") chooses nothing."""
    tail, box, where = last_part(text)
    if tail is None or (where and box is None):
        return None, where
    tail = tail if box is None else box
    if letter := _one_letter(tail) or _match_choice(tail, choices):
        return letter, "whole answer"
    undenied = _DENIED.sub(" ", tail)
    anchors = [m for m in _MC_ANCHOR.finditer(undenied) if m[1].isupper()]
    if anchors:
        last = anchors[-1]
        around = undenied[max(last.start() - 12, 0) : last.end()]
        if _is_hedged(last[1], undenied[last.end() :]) or _NEGATED.search(around) or "不" in around:
            return None, "hedged or negated choice"
        return last[1], "final phrase"
    said = phrase(tail)
    if said and (letter := _match_choice(said, choices)):
        return letter, "option text"
    affirmed = {m[1] for m in _AFFIRMED.finditer(undenied)}
    if len(affirmed) == 1 and not (set(_LONE_LETTER.findall(undenied)) - affirmed):
        return affirmed.pop(), "final phrase"
    if _NEGATED.search(undenied):
        return None, "negated choice"
    tail = undenied
    if len(set(_MARKED_OPTION.findall(tail))) > 2:
        return None, "a list of the options"
    leading = re.match(r"\s*\(?([A-J])[).:,。，、]", tail)
    if leading:
        others = set(_LONE_LETTER.findall(tail)) - {leading[1]}
        if _is_hedged(leading[1], tail[leading.end() - 1 :]) or (others and (_UNSURE.search(tail) or affirmed)):
            return None, "hedged choice"
        return leading[1], "leading letter"
    marked = set(re.findall(r"\(([A-J])\)|\*\*([A-J])\*\*", tail))
    letters = {a or b for a, b in marked} or set(_LONE_LETTER.findall(tail))
    if len(letters) == 1:
        return letters.pop(), "only letter"
    if not letters and len(tail) <= 200 and (letter := _named_choice(tail, choices)):
        return letter, "option text"
    return None, "no single choice"
