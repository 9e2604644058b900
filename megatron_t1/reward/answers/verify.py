"""One verdict on one response: extraction, the cheap comparison, and the full one when it is needed.

`verify_cheaply` never does more than bounded string work. `verify` may take long or die on hostile text: only the
worker processes of pool.py call it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from megatron_t1.reward.answers import choices as letters
from megatron_t1.reward.answers import extract
from megatron_t1.reward.answers.equal import equal
from megatron_t1.reward.answers.explain import explain
from megatron_t1.reward.answers.normalize import normalize
from megatron_t1.reward.answers.policy import DEFAULT, EqualityConfig
from megatron_t1.reward.answers.question import asks_for_percent, is_copied, names_another_quantity, same_in_asked_base
from megatron_t1.reward.answers.read import read_both
from megatron_t1.reward.answers.tokens import NO_MATHEMATICS
from megatron_t1.reward.answers.values import equal_cheaply
from megatron_t1.types import AnswerMode, Verdict

_OPTION = "the letter of an option"
_OPTION_MARK = re.compile(
    r"(\\text\{)?\s*(?:\([A-J]\)|[A-J](?:\.(?!\d)|\)))(?:\s*(\})\s*|\s+|(?=\d))(?![+=^'/*]|-\s|\\c[au]p)(?=\S)"
)
"""Apart from what it marks: (C)e^x is a product."""
MAX_REASON_CHARS = 2000


@functools.lru_cache(maxsize=64)
def normalized_gold(gold: str, mode: AnswerMode) -> str:
    """Its answer, normalised."""
    if "\\boxed" in gold or "\\fbox" in gold:
        gold = extract.last_box(gold) or gold
    elif mode == "text" and len(gold) > 80:
        gold = extract.sentence_answer(gold)[0] or gold
    return normalize(gold)


def _extracted(text: str, mode: AnswerMode) -> tuple[str | None, str]:
    if mode == "answer":
        bare = text.strip()
        if extract.BOX.search(bare):
            return extract.last_box(bare[-extract.TAIL_CHARS :]), "box"
        if len(bare) <= extract.MAX_ANSWER_CHARS and (phrase := extract.phrase(bare)):
            return phrase, "final phrase"
        return (bare[: extract.MAX_ANSWER_CHARS + 1] or None), "bare answer"
    return extract.sentence_answer(text) if mode == "text" else extract.response_answer(text)


def _choose(gold: str, text: str, choices: tuple[str, ...]) -> Verdict:
    wanted = letters.gold_letter(gold, choices)
    if wanted is None:
        return Verdict("wrong", None, f"the gold {gold[:40]!r} is not a choice")
    letter, where = letters.chosen_letter(text, choices)
    if letter is None:
        return Verdict("no_answer", None, where)
    return Verdict("correct" if letter == wanted else "wrong", letter, f"{where}: {letter}, gold {wanted}")


def verify_cheaply(
    gold: str, text: str, mode: AnswerMode, choices: tuple[str, ...] = (), rounding: bool = True
) -> tuple[Verdict | None, str | None]:
    """(verdict, extracted answer); verdict None when only the full comparison can tell."""
    if mode == "mc":
        verdict = _choose(gold, text, choices)
        return verdict, verdict.extracted
    answer, where = _extracted(text, mode)
    if answer is None:
        return Verdict("no_answer", None, where), None
    if len(answer) > extract.MAX_ANSWER_CHARS:
        return Verdict("wrong", answer[:80], f"an answer of more than {extract.MAX_ANSWER_CHARS} characters"), None
    same = equal_cheaply(normalized_gold(gold, mode), normalize(answer), rounding)
    if same is None:
        return None, answer
    return Verdict("correct" if same else "wrong", answer, f"{where}, compared as text or exact numbers"), answer


@functools.lru_cache(maxsize=1024)  # the samples of one question repeat their answers
def verify_fully(
    gold: str,
    answer: str,
    mode: AnswerMode,
    question: str = "",
    refuse_copies: bool = True,
    equality: EqualityConfig = DEFAULT,
) -> Verdict:
    """The verdict on an extracted answer; the question, when it is known, says whether it is copied."""
    known = normalized_gold(gold, mode)
    if _names_option(known, answer):
        return Verdict("correct", answer, _OPTION)
    try:
        given = normalize(answer)
        if (option := _OPTION_MARK.match(given)) and letters.gold_letter(known, ()) is None:  # (C) 42
            given = ("" if option[2] else option[1] or "") + given[option.end() :]
        reads, spelled = read_both(known, given)
        same = equal(reads, spelled, _for_question(equality, question)) or same_in_asked_base(known, given, question)
        copied = same and refuse_copies and is_copied(reads, spelled, question)
    except NO_MATHEMATICS as error:
        return Verdict("wrong", answer, f"cannot be compared: {error or type(error).__name__}"[:200])
    except Exception as error:
        return Verdict("crash", answer, f"{type(error).__name__}: {error}"[:200])
    if same and names_another_quantity(given, gold, question):
        return Verdict("wrong", answer, "a label of another quantity than asked")
    if copied:
        return Verdict("wrong", answer, "a formula of the question, not computed")
    return Verdict("correct" if same else "wrong", answer, "compared as mathematics")


def _names_option(gold: str, answer: str) -> bool:
    """(A) 12, where the gold is the letter alone."""
    named = re.match(r"\W*(?:\\text\w*\s*\{)?[\s(]*[A-J]\s*[.):]|.*\b(?:option|choice)\b", answer, re.I)
    return (
        named is not None
        and "=" not in gold
        and letters.gold_letter(gold, ()) in letters.chosen_letter(answer)[:1] != (None,)
    )


def _for_question(equality: EqualityConfig, question: str) -> EqualityConfig:
    asked = equality.percent == "asked" and asks_for_percent(question)
    return replace(equality, percent="either") if asked else equality


def explained(
    verdict: Verdict, gold: str, mode: AnswerMode, question: str = "", equality: EqualityConfig = DEFAULT
) -> Verdict:
    """With a reason that says what was read, which rules decided, and on which choice of the user's it hangs."""
    if mode == "mc" or verdict.extracted is None or verdict.reason == _OPTION:
        return verdict
    told = explain(normalized_gold(gold, mode), normalize(verdict.extracted), _for_question(equality, question))
    return replace(verdict, reason=f"{verdict.reason}; {told}"[:MAX_REASON_CHARS])


def verify(
    gold: str,
    text: str,
    mode: AnswerMode = "response",
    choices: tuple[str, ...] = (),
    question: str = "",
    equality: EqualityConfig = DEFAULT,
) -> Verdict:
    """Both steps in this process; for workers."""
    verdict, answer = verify_cheaply(gold, text, mode, choices, equality.rounding)
    if verdict is not None or answer is None:
        return verdict or Verdict("no_answer", None, "no answer")
    return verify_fully(gold, answer, mode, question, equality=equality)
