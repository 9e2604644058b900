"""What disqualifies a question or a chain, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatron_t1.reasoning import REVISION
from megatron_t1.reward.answers.numbers import answer_key
from megatron_t1.synthesize.config import FilterConfig
from megatron_t1.types import Reward

GIVE_AWAY = (
    r"\b(?:given|provided|supplied|reference|expected|official|gold(?:en)?|stated|target) (?:final )?"
    r"(?:answer|solution|result)\b",
    r"\banswer (?:key|sheet)\b",
    r"\bground[- ]truth\b",
    r"\b(?:we|i) (?:know|are told|am told|were told) (?:that )?the (?:final |right |correct )?"
    r"(?:answer|solution) (?:is|should be|must be)\b",
    r"\bshould (?:match|agree with|be equal to|equal) the (?:correct|right|known) (?:answer|solution|result)\b",
    r"\b(?:attempt|material|critique|approach from attempt)\s*(?:#\s*)?\d|\bsolution\s*#\s*\d|(?-i:\bSolution) \d",
    r"\bthe (?:critique|critic|checker|reviewer|verifier|grader|student|draft)\b",
    r"\bas an ai\b",
)
"""Phrases of somebody who was told the answer or who reads other people's attempts."""

_FAILS = (
    r"(?:[^.!?\n]|\.\d){0,100}?"
    r"(?:\bnot\b|n['’]t\b|≠|\\neq?\b|\btoo\b|\bfails?\b|\bcontradict|\b(?:impossible|invalid)\b)"
)
"""The rest of a sentence, which says that something fails."""
_DENIED = (
    rf"\b(?:try|test|guess|suppose)(?:ing)?\b[^.!?\n]{{0,12}}ANSWER{_FAILS}"
    r"|ANSWER[^\w.!?\n]{0,3}(?:fails\b|does(?:n['’]t| not)\b|is (?:too|impossible|not (?:an?|the|valid|allowed))\b"
    rf"|(?:\w{{1,20}} ?\w{{0,20}})?[.,;!?\n]\s{{0,3}}(?:but|yet|however|which|that|this)\b{_FAILS})"
)
"""An answer that is tried, or stated at the end of a clause, and fails in that sentence or the next."""
NO_CORRECTION = "holds no failure and its correction"


def question_is_unfit(cfg: FilterConfig, rewards: Sequence[Reward], require_wrong: bool) -> str | None:
    """Why a question is left out after its attempts; None when it is fit."""
    num_right = sum(reward.correct for reward in rewards)
    if num_right == 0:
        answers = Counter(answer_key(reward.extracted) for reward in rewards if reward.extracted is not None)
        most = answers.most_common(1)[0][1] if answers else 0
        if most / len(rewards) > cfg.max_agreement_on_wrong:
            return "noisy: the attempts agree on an answer that is not the reference"
        return "too hard: no attempt is right"
    if num_right / len(rewards) > cfg.max_pass_rate:
        return "too easy"
    if require_wrong and not any(reward.outcome == "wrong" for reward in rewards):
        return "no attempt with a wrong answer"
    return None


def chain_is_unfit(cfg: FilterConfig, response: str, reward: Reward, question: str) -> str | None:
    """Why a finished chain is left out; None when it is kept. What the question itself says gives nothing away."""
    if not reward.correct:
        return "the chain's answer is not right"
    if reward.penalties:
        return f"penalty: {min(reward.penalties)}"
    if not cfg.min_chars <= len(response) <= cfg.max_chars:
        return "too short" if len(response) < cfg.min_chars else "too long"
    asked = question.lower()
    for pattern in (*GIVE_AWAY, *cfg.give_away):
        found = (match.group().lower().removeprefix("the ") for match in re.finditer(pattern, response, re.I))
        if any(phrase not in asked for phrase in found):  # of "a student" a chain may say "the student"
            return "gives the answer or the attempts away"
    return None


def corrects(response: str, wrong_answers: Sequence[str | None]) -> bool:
    """Whether the thinking of a finished chain still shows a failure that it corrects: words of somebody who takes
    something back, or the answer of a wrong attempt that it was made of, stated and denied in the next breath. That
    answer alone says nothing: a 2 stands in most chains."""
    thinking = response.rpartition("</think>")[0] or response
    stated = "|".join(re.escape(answer) for answer in wrong_answers if answer)
    denied = _DENIED.replace("ANSWER", rf"(?<![\w.])(?:{stated})(?!\w|\.\d)")
    return REVISION.search(thinking) is not None or bool(stated and re.search(denied, thinking, re.I))
