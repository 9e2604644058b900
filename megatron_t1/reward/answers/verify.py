"""One verdict on one response: extraction, the cheap comparison, and the full one when it is needed.

`verify_cheaply` never does more than bounded string work. `verify` may take long or die on hostile text: only the
worker processes of pool.py call it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from megatron_t1.reward.answers import extract
from megatron_t1.reward.answers.equal import check_readable, equal, equal_cheaply
from megatron_t1.reward.answers.explain import explain
from megatron_t1.reward.answers.latex import UndecidableError
from megatron_t1.reward.answers.normalize import normalize
from megatron_t1.reward.answers.question import asks_for_percent, is_copied
from megatron_t1.reward.answers.read import read
from megatron_t1.types import AnswerMode, Verdict

MAX_GOLD_CHARS = 200
_COMPARED = "compared as mathematics"
_WITHOUT_PERCENT = "compared without %: the question asks for percent"
MAX_REASON_CHARS = 2000


@functools.lru_cache(maxsize=64)
def _gold(gold: str, mode: AnswerMode) -> str:
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
    wanted = extract.gold_letter(gold, choices)
    if wanted is None:
        return Verdict("wrong", None, f"the gold {gold[:40]!r} is not a choice")
    letter, where = extract.chosen_letter(text, choices)
    if letter is None:
        return Verdict("no_answer", None, where)
    return Verdict("correct" if letter == wanted else "wrong", letter, f"{where}: {letter}, gold {wanted}")


def verify_cheaply(
    gold: str, text: str, mode: AnswerMode, choices: tuple[str, ...] = ()
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
    same = equal_cheaply(_gold(gold, mode), normalize(answer))
    if same is None:
        return None, answer
    return Verdict("correct" if same else "wrong", answer, f"{where}, compared as text or exact numbers"), answer


@functools.lru_cache(maxsize=1024)  # the samples of one question repeat their answers
def verify_fully(gold: str, answer: str, mode: AnswerMode, question: str = "", refuse_copies: bool = True) -> Verdict:
    """The verdict on an extracted answer; the question, when it is known, says whether it is copied."""
    try:
        reads, spelled = read(_gold(gold, mode)), normalize(answer)
        same, how = equal(reads, read(spelled)), _COMPARED
        if not same and spelled.endswith("%") and "%" not in gold and asks_for_percent(question):
            same, how = equal(reads, read(spelled[:-1])), _WITHOUT_PERCENT
        copied = same and refuse_copies and is_copied(reads, read(spelled), question)
    except (UndecidableError, RecursionError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        # the parser and SymPy fail in many ways on text that is no mathematics; none of them is a right answer
        return Verdict("wrong", answer, f"cannot be compared: {error or type(error).__name__}"[:200])
    except Exception as error:
        return Verdict("crash", answer, f"{type(error).__name__}: {error}"[:200])
    if copied:
        return Verdict("wrong", answer, "a formula of the question, not computed")
    return Verdict("correct" if same else "wrong", answer, how)


def explained(verdict: Verdict, gold: str, mode: AnswerMode) -> Verdict:
    """With a reason that says what was read and which rules decided."""
    if mode == "mc" or verdict.extracted is None:
        return verdict
    spelled = normalize(verdict.extracted)
    told = explain(_gold(gold, mode), spelled[:-1] if verdict.reason == _WITHOUT_PERCENT else spelled)
    return replace(verdict, reason=f"{verdict.reason}; {told}"[:MAX_REASON_CHARS])


def verify(
    gold: str, text: str, mode: AnswerMode = "response", choices: tuple[str, ...] = (), question: str = ""
) -> Verdict:
    """Both steps in this process; for workers."""
    verdict, answer = verify_cheaply(gold, text, mode, choices)
    if verdict is not None or answer is None:
        return verdict or Verdict("no_answer", None, "no answer")
    return verify_fully(gold, answer, mode, question)


def gold_problem(gold: str) -> str | None:
    """Why an answer cannot serve as a gold; None when it can. For workers."""
    if len(gold) > MAX_GOLD_CHARS:
        return f"longer than {MAX_GOLD_CHARS} characters"
    itself = verify(gold, rf"\boxed{{{gold}}}")
    if itself.outcome != "correct":
        return f"it is not accepted as its own answer: {itself.reason}"
    try:
        check_readable(read(_gold(gold, "response")))
    except (UndecidableError, RecursionError, ValueError, TypeError) as error:
        return f"it cannot be compared: {error or type(error).__name__}"[:200]
    return None
