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

THINK_CLOSE = re.compile(r"</(?:think|thinking|thought)>|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>", re.I)
_THINK_OPEN = re.compile(r"<(?:think|thinking|thought)>|<\|begin_of_thought\|>|<\|channel\|>analysis", re.I)
_BOX_TAGS = re.compile(r"<\|begin_of_box\|>((?:(?!<\|b).)*?)<\|end_of_box\|>|<answer>((?:(?!<a).)*?)</answer>", re.S)
_END_TOKENS = re.compile(r"<[|｜][^\s<>|｜]{1,30}[|｜]>|</?(?:answer|s)>|<end_of_turn>", re.I)
BOX = re.compile(r"\\(?:f?boxed|fbox)(?![a-zA-Z])")
_JOINT = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?\s*=|[\s,;.$&]|\\[()\[\],;!: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\*"
)
_ANCHOR = re.compile(
    r"(?<!\{)(?:answer|result|solution|r[ée]ponse|答案?|\bans)\"?(?:\s+(?:is|are|est|equals))?"
    r"(?:\s*[:：]|(?<=答案)[是为]|(?<=ns)\.|(?<=is)|(?<=are)|(?<=est)|(?<=equals))\s*"
    r"|(?:respuesta|resposta|risposta|antwort|ответ|答え)(?:\s+(?:ist|es|[éè]))?"
    r"(?:\s*[:：はが]|(?<=\sist)|(?<=\ses)|(?<=\s[éè]))\s*(?=\**\s*(?:\$|\\[(\[]|[-+]?\d))"  # and no sentence
    r"|^[#* ]{0,9}(?:final )?answer[* ]{0,9}\n"
    r"|####\s*(?=\S[^\n]{0,60}\s*\Z)",
    re.I | re.M,
)
_COPULA = re.compile(r"\b(?:is|are|equals|be)\b|(?<![不非])[是为]|=")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_QUOTED = re.compile(rf"{FORMULA.pattern}|\"([^\"\n]+)\"", re.S)
_GOES_ON = re.compile(
    r"\s*\**\s*(?:[A-Za-z]{1,12}\s+)?(?:[,;/|&]|or\b|and\b|或|和)\s*"
    r"(?:(?:or|and|maybe|perhaps|possibly|else|even|just)\s+){0,3}(?:\$|\\[(\[]|\"|-?\d)"
)
"""Behind a formula: a second one that is joined to it."""
_ALONE = re.compile(
    r"\n[*`]*(?:\$\$?([^$\n]{1,200})\$\$?|\\[(\[]([^\n]{1,200})\\[)\]]|(-?\d[\d.,/]{0,40}%?))[*`]*[.。]?\Z", re.ASCII
)
"""A last line that is nothing but a formula or a number."""
_NUMBER = re.compile(
    r"(?<![a-zA-Z0-9_.])-?\$?(?:\\frac\{-?\d+\}\{\d+\}|\d[\d,]{0,30}\s*/\s*\d+|\d{1,3}(?:,\d{3}){1,12}(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s*(?:%|\\%|percent\b|pct\b))?",
    re.ASCII,
)


def after_thinking(text: str) -> str | None:
    """The text after the last closed thinking tag; None when thinking was opened and never closed."""
    closed = 0
    if "</" in text or "<|" in text:
        for match in THINK_CLOSE.finditer(text):
            closed = match.end()
    tail = text[closed:]
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
    rest = text[anchors[-1].end() :].lstrip(" \n*").rstrip()
    math = _QUOTED.match(rest)
    if math and not _GOES_ON.match(rest, math.end()):
        return math[math.lastindex or 0].strip() or None
    sentence = re.split(r"\n(?!\s*or\b)|。|(?<!\d)\.(?:\s|$)|\.\s*$|\.(?=\s+[A-Z])", rest, maxsplit=1)[0]
    copulas = [m.end() for m in _COPULA.finditer(sentence) if m.end() < len(sentence)]  # "the volume is 120"
    before = sentence[: copulas[-1]] if copulas else ""
    if not math and re.search(r"[a-z]{3}|[\u4e00-\u9fff]", before) and not _names_another(before):
        sentence = sentence[copulas[-1] :]
    return sentence.removesuffix("です").strip(" *:`") or None


def _names_another(before: str) -> bool:
    """Whether another answer stands before the last "is": either that it is 41 or that it is ..."""
    alternatives = re.split(r"\bor\b", before)
    return "either" in before or (len(alternatives) > 1 and re.search(r"[\d$\\]", alternatives[0]) is not None)


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


def last_part(text: str) -> tuple[str | None, str | None, str]:
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
    tail, box, where = last_part(text)
    if tail is None or where:
        return box, where
    said = phrase(_without_money(tail))
    if said is not None:
        return said[:MAX_ANSWER_CHARS], "final phrase"
    bare = tail.strip()
    if bare and len(bare) <= 200 and "\n" not in bare:
        return bare, "whole response"
    if alone := _ALONE.search(bare):
        return alone[alone.lastindex or 0].strip(), "last line"
    return None, "no box and no final phrase"


def sentence_answer(text: str) -> tuple[str | None, str]:
    """(answer, where) of a sentence that holds the answer: box, phrase, last formula, last number, in this order."""
    tail, box, where = last_part(text)
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
    formulas = [m[m.lastindex or 0].strip() for m in FORMULA.finditer(end)]
    if formulas and formulas[-1]:
        return formulas[-1][:MAX_ANSWER_CHARS], "last formula"
    numbers = _NUMBER.findall(said if said is not None else tail)
    if numbers:
        return numbers[-1].strip(" ,"), "last number"
    bare = tail.strip()
    return (bare, "whole text") if bare and len(bare) <= 200 else (None, "no answer in the text")
