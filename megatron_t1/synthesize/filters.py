"""What disqualifies a question or a chain, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatron_t1.reasoning import REVISION
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
    r"\b(?:attempt|solution|material|critique|approach from attempt)\s*(?:#\s*)?\d",
    r"\bthe (?:critique|critic|checker|reviewer|verifier|grader|student|draft)\b",
    r"\bas an ai\b",
)
"""Phrases of somebody who was told the answer or who reads other people's attempts."""

NO_CORRECTION = "holds no failure and its correction"


def question_is_unfit(cfg: FilterConfig, rewards: Sequence[Reward], require_wrong: bool) -> str | None:
    """Why a question is left out after its attempts; None when it is fit."""
    num_right = sum(reward.correct for reward in rewards)
    if num_right == 0:
        answers = Counter(reward.extracted for reward in rewards if reward.extracted is not None)
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
    for pattern in (*GIVE_AWAY, *cfg.give_away):
        phrase = re.search(pattern, response, re.I)
        if phrase and phrase.group().lower() not in question.lower():
            return "gives the answer or the attempts away"
    return None


def corrects(response: str, wrong_answers: Sequence[str | None]) -> bool:
    """Whether the thinking of a finished chain still shows a failure that it corrects: a word of revision, or the
    answer of a wrong attempt that it was made of."""
    thinking = response.rpartition("</think>")[0] or response
    tried = any(re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w.])", thinking) for answer in wrong_answers if answer)
    return tried or REVISION.search(thinking) is not None
