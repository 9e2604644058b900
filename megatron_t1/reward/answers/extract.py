r"""Finds the answer in what a model wrote: strict, because every loose rule here is a way to be paid for nothing.

A response is read after its last closed thinking tag; thinking that never closes has no answer. There, boxes win over
everything: the last balanced `\boxed` counts, together with boxes joined to it on the same line ("\boxed{1} and
\boxed{2}" is the list 1, 2). An unclosed or empty last box is no answer. Only a text without any box is read for a
final phrase ("Answer: 42") or, if it is short, as a bare answer.

Left out on purpose: searching the thinking, "any number in the text", and choosing the candidate that fits the gold.
"""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 4000
"""Longer answers are refused: the longest gold of MATH and Omni-MATH is below 400 characters."""
TAIL_CHARS = 20_000
"""Only this much of a response's end is read: whatever counts stands there, and time stays bounded."""

THINK_CLOSE = re.compile(r"</(?:think|thinking|thought)>|<\|end_of_thought\|>", re.I)
_THINK_OPEN = re.compile(r"<(?:think|thinking|thought)>|<\|begin_of_thought\|>", re.I)
_BOX_TAGS = re.compile(r"<\|begin_of_box\|>((?:(?!<\|b).)*?)<\|end_of_box\|>|<answer>((?:(?!<a).)*?)</answer>", re.S)
_END_TOKENS = re.compile(r"<\|[a-z_]{1,20}\|>|</?(?:answer|s)>|<end_of_turn>", re.I)
BOX = re.compile(r"\\(?:f?boxed|fbox)(?![a-zA-Z])")
_JOINT = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?\s*=|[\s,;.$&]|\\[()\[\],;!: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\*"
)
_ANCHOR = re.compile(
    r"(?<!\{)(?:final answer|answer|result|solution|r[ée]ponse|答案)(?:\s+(?:is|are|est))?"
    r"(?:\s*[:：]|\s*(?:是|为)|(?<=is)|(?<=are)|(?<=est))\s*"
    r"|####\s*(?=\S[^\n]{0,60}\s*\Z)",
    re.I,
)
_COPULA = re.compile(r"\b(?:is|are|equals|be)\b|[是为=]")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_NUMBER = re.compile(
    r"(?<![a-zA-Z0-9_.])-?\$?(?:\\frac\{-?\d+\}\{\d+\}|\d[\d,]{0,30}\s*/\s*\d+|\d{1,3}(?:,\d{3}){1,12}(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s*(?:%|\\%|percent\b|pct\b))?",
    re.ASCII,
)


def after_thinking(text: str) -> str | None:
    """The text after the last closed thinking tag; None when thinking was opened and never closed."""
    closes = list(THINK_CLOSE.finditer(text)) if "</" in text or "<|" in text else []
    tail = text[closes[-1].end() :] if closes else text
    if _THINK_OPEN.search(tail):
        return None
    return tail


def _closing_braces(text: str) -> dict[int, int]:
    """Opening brace -> the brace that closes it, in one pass."""
    pairs, stack = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.S):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            pairs[stack.pop()] = match.start()
    return pairs


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of the outermost boxes; content None when it is unclosed."""
    boxes: list[tuple[int, int, str | None]] = []
    pairs = _closing_braces(text)
    for match in BOX.finditer(text):
        start, end = match.span()
        if boxes and start < boxes[-1][1]:
            continue
        brace = re.compile(r"\s*\{").match(text, end)
        if brace is not None:
            close = pairs.get(brace.end() - 1)
            boxes.append((start, end, None) if close is None else (start, close + 1, text[brace.end() : close]))
        else:  # `\boxed 4`
            token = re.compile(r"\s*(-?[\w./]{1,40})").match(text, end)
            boxes.append((start, token.end() if token else end, token[1].rstrip(".") if token else None))
    return boxes


def last_box(text: str) -> str | None:
    """Content of the last box, with the boxes joined to it on its line; None when it is unclosed, empty or absent."""
    boxes = _boxes(text)
    if not boxes or not (boxes[-1][2] or "").strip():
        return None
    contents = [str(boxes[-1][2])]
    for left, right in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        between = text[left[1] : right[0]]
        if left[2] is None or len(between) > 40 or "\n" in between or _JOINT.sub("", between):
            break
        contents.insert(0, left[2])
    contents = list(dict.fromkeys(c.strip() for c in contents))
    inner = contents[0] if len(contents) == 1 else ", ".join(contents)
    if BOX.search(inner):
        return last_box(inner)
    return inner


def phrase(text: str) -> str | None:
    """What follows the last "answer is"/"Answer:", up to the end of its sentence."""
    anchors = list(_ANCHOR.finditer(text))
    if not anchors:
        return None
    rest = text[anchors[-1].end() :].strip()
    math = re.match(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", rest, re.S)
    if math:
        return next(g for g in math.groups() if g is not None).strip() or None
    sentence = re.split(r"\n|。|(?<!\d)\.(?:\s|$)|\.\s*$|\.(?=\s+[A-Z])", rest, maxsplit=1)[0]
    copulas = [m.end() for m in _COPULA.finditer(sentence) if m.end() < len(sentence)]  # "the volume is 120"
    if copulas and re.search(r"[a-z]{3}|[\u4e00-\u9fff]", sentence[: copulas[-1]]):
        sentence = sentence[copulas[-1] :]
    return sentence.strip(" *:`") or None


def _boxed(match: re.Match[str]) -> str:
    """What stands between tags that mean a box, in one."""
    inner = (match[1] or match[2] or "").strip()
    return inner if BOX.search(inner) else rf"\boxed{{{inner}}}"


def _without_money(text: str) -> str:
    """A text in which a dollar sign before a number is no formula's: when what it would open has words in it."""
    between = re.findall(r"(?<!\$)\$(?!\$)([^$]*)\$", text)
    if any(
        re.search(r"\s[A-Za-z]{3,}\s|^\d.*[+\-*/=]\s*$", re.sub(r"\\[a-z]+\{[^{}]*\}", "", each)) for each in between
    ):
        return re.sub(r"\$(?=\d)", "", text)
    return text


def _last_part(text: str) -> tuple[str | None, str | None, str]:
    """(what follows the thinking, its last box, where the answer is or why there is none; '' when there is no box)."""
    tail = after_thinking(text)
    if tail is None:
        return None, None, "thinking never closed"
    tail = _END_TOKENS.sub(" ", _BOX_TAGS.sub(_boxed, tail[-TAIL_CHARS:]))
    if not BOX.search(tail):
        return tail, None, ""
    box = last_box(tail)
    return tail, box, "last box" if box is not None else "the last box is empty or unclosed"


def response_answer(text: str) -> tuple[str | None, str]:
    """(answer, where it was found or why there is none) of a whole response."""
    tail, box, where = _last_part(text)
    if tail is None or where:
        return box, where
    said = phrase(_without_money(tail))
    if said is not None:
        return said[:MAX_ANSWER_CHARS], "final phrase"
    bare = tail.strip()
    if bare and len(bare) <= 200 and "\n" not in bare:
        return bare, "whole response"
    return None, "no box and no final phrase"


def sentence_answer(text: str) -> tuple[str | None, str]:
    """(answer, where) of a sentence that holds the answer: box, phrase, last formula, last number, in this order."""
    tail, box, where = _last_part(text)
    if tail is None:
        return None, where
    tail = _without_money(tail)
    said = phrase(tail)
    if where:
        last = [m.end() for m in BOX.finditer(tail)][-1]
        if not (said and tail.casefold().rfind("final answer is") > last):
            return box, where
    if said is not None and (len(said) <= 40 or not _NUMBER.search(said)):
        return said[:MAX_ANSWER_CHARS], "final phrase"
    end = tail[-MAX_ANSWER_CHARS:]
    formulas = [next(g for g in m.groups() if g is not None).strip() for m in _MATH.finditer(end)]
    if formulas and formulas[-1]:
        return formulas[-1][:MAX_ANSWER_CHARS], "last formula"
    numbers = _NUMBER.findall(said if said is not None else tail)
    if numbers:
        return numbers[-1].strip(" ,"), "last number"
    bare = tail.strip()
    return (bare, "whole text") if bare and len(bare) <= 200 else (None, "no answer in the text")


# --- multiple choice -------------------------------------------------------------------------------------------------

_LETTER = r"[(\[*$\s\"']*(?:\\text\{\s*\(?|\\mathrm\{|\\mathbf\{|\\textbf\{\s*\(?)?([A-J])(?![A-Za-z'’])\)?\}?"
_MC_ANCHOR = re.compile(
    r"(?:(?:therefore|thus|hence|actually|conclude|think|believe)[,:\s]+"
    r"(?:(?:it|it's|that|that's|this|the|is|must|be|would|say|i|think|go|with|choose|answer|option|choice)\s+)*"
    r"|(?:answer|option|choice|choose|correct|select|r[ée]ponse|答案|选择|选)(?-i:[^.\n。A-J]){0,60}?"
    r"(?:\bis\b|\bare\b|\bbe\b|\best\b|[:：]|\b(?:answer|option|choice|choose|select)\b|是|为|选)[*\s]*"
    r"(?:definitely|for sure|clearly|probably|certainly|the|option|choice|surely)?\s*(?:option|choice)?\s*|选择?)"
    + _LETTER,
    re.I,
)
_HEDGE_AFTER = re.compile(
    r"^[)*\s.}$]*(?:,|/|&|or\b|and\b|或|和|及)[\s,]*(?:or\s+|and\s+)?(?:(?:maybe|perhaps|possibly)\s+)?"
    r"[(*]*([A-J])(?![A-Za-z'’])"
)


_AFFIRMED = re.compile(r"(?<![A-Za-z])([A-J])\)?\s+(?:is|must be)\s+(?:the\s+)?(?:correct|right|true|answer|best)\b")
_DENIED = re.compile(
    r"(?:\b(?i:not|non|nor|neither|cannot)\b|n't\b|不是|不选|而非)\s*(?:be\b|is\b|the\b|option\b|choice\b|answer\b|\s)*\(?[A-J]\b\)?"
    r"(?:\s*(?:,|\bor\b|\bnor\b|\band\b|或|和)\s*\(?[A-J]\b\)?)*"
    r"|\(?\b[A-J]\)?\s+(?:is|was|can|could)(?:\s+be)?\s*(?:not\b|n't\b|never\b|wrong\b|incorrect\b|false\b|invalid\b)[^.;,。]*"
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


def _one_letter(text: str) -> str | None:
    """A text that is nothing but one letter, in whatever wrapping; lower case counts only here."""
    bare = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text).strip(" \n\t()[]{}$*.:\"'`。")
    return bare.upper() if re.fullmatch(r"[A-Ja-j]", bare) else None


def _text_key(text: str) -> str:
    return re.sub(r"[\s.$*\\{}()]+", " ", re.sub(r"\\text|\\mathrm", "", text)).strip().casefold()


def _match_choice(text: str, choices: tuple[str, ...]) -> str | None:
    keys = [_text_key(c) for c in choices]
    key = _text_key(text)
    return "ABCDEFGHIJ"[keys.index(key)] if keys.count(key) == 1 and keys.index(key) < 10 else None


def _named_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The one option whose words stand in the text."""
    said, *options = (re.sub(r"\W+", " ", _text_key(t)).strip() for t in (text, *choices[:10]))
    named = [i for i, option in enumerate(options) if option and f" {option} " in f" {said} "]
    return "ABCDEFGHIJ"[named[0]] if len(named) == 1 else None


def gold_letter(gold: str, choices: tuple[str, ...]) -> str | None:
    """The letter a gold stands for: itself, its option text, or the marked letter inside a sentence."""
    if letter := _one_letter(gold) or _match_choice(gold, choices):
        return letter
    marked = re.search(r"\(([A-J])\)", gold) or re.search(r"(?:^|\n)\s*([A-J])[\s.):]", gold)
    return marked.group(1) if marked else None


def chosen_letter(text: str, choices: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """(letter, where or why not) of a multiple-choice response. A hedge ("C or D", "not C") chooses nothing."""
    tail, box, where = _last_part(text)
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
        if _HEDGE_AFTER.search(undenied[last.end() :]) or _NEGATED.search(around) or "不" in around:
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
        if _HEDGE_AFTER.search(tail[leading.end() - 1 :]) or (others and (_UNSURE.search(tail) or affirmed)):
            return None, "hedged choice"
        return leading[1], "leading letter"
    marked = set(re.findall(r"\(([A-J])\)|\*\*([A-J])\*\*", tail))
    letters = {a or b for a, b in marked} or set(_LONE_LETTER.findall(tail))
    if len(letters) == 1:
        return letters.pop(), "only letter"
    if not letters and len(tail) <= 200 and (letter := _named_choice(tail, choices)):
        return letter, "option text"
    return None, "no single choice"
