"""The figures of an evaluation, from its graded rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_t1.evaluation import stats
from megatron_t1.reward.answers.numbers import answer_key


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over questions with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One set, one model."""

    label: str
    set: str
    num_questions: int
    num_samples: int
    """Samples a question."""
    pass_at_1: float
    """Mean over questions and samples (with k samples, avg@k)."""
    interval: tuple[float, float]
    """95% interval of pass_at_1."""
    interval_method: str
    pass_at_k: dict[str, Interval]
    """k -> at least one of k is right; the unbiased estimator of Chen et al. (2021), averaged over questions."""
    majority_at_k: dict[str, Interval]
    """k -> the most frequent answer of k is right, ties drawn for; wrong answers vote together where they
    are one number, or one text but for layout."""
    mean_tokens: float
    """Response tokens."""
    median_tokens: float
    max_tokens: int
    mean_tokens_correct: float | None
    """Of right responses; None when there is none."""
    share_cut: float
    """Share of responses that the length limit cut."""
    outcomes: dict[str, int]
    penalties: dict[str, int]
    by: dict[str, dict[str, dict[str, Any]]]
    """"level" and "subject" -> group -> num_questions, pass_at_1, interval."""
    settings: dict[str, Any]
    """What was asked of what; two results with equal settings are of the same experiment."""


def summarize(label: str, name: str, rows: Iterable[dict[str, Any]], settings: dict[str, Any]) -> EvalResult:
    """Every figure of an evaluation from its rows."""
    correct: dict[str, list[bool]] = {}
    answers: dict[str, list[str | None]] = {}
    groups: dict[str, dict[str, list[str]]] = {"level": {}, "subject": {}}
    outcomes: dict[str, int] = {}
    penalties: dict[str, int] = {}
    lengths, cut, lengths_right = [], [], []
    for row in rows:
        identity, reward = row["id"], row["reward"]
        if identity not in correct:
            for kind, ids_of in groups.items():
                if row.get(kind) is not None:
                    ids_of.setdefault(str(row[kind]), []).append(identity)
        correct.setdefault(identity, []).append(reward["correct"])
        answers.setdefault(identity, []).append(vote(reward))
        outcomes[reward["outcome"]] = outcomes.get(reward["outcome"], 0) + 1
        for penalty in reward["penalties"]:
            penalties[penalty] = penalties.get(penalty, 0) + 1
        lengths.append(row["num_tokens"])
        cut.append(row["finish_reason"] == "length")
        if reward["correct"]:
            lengths_right.append(row["num_tokens"])
    num_samples = len(lengths) // len(correct)
    mean, low, high = stats.accuracy_interval(list(correct.values()))
    ks = [k for k in (2**i for i in range(1, 10)) if k <= num_samples]
    return EvalResult(
        label=label,
        set=name,
        num_questions=len(correct),
        num_samples=num_samples,
        pass_at_1=mean,
        interval=(low, high),
        interval_method=stats.interval_method(num_samples),
        pass_at_k={str(k): _pass_at_k(correct, k) for k in ks},
        majority_at_k={str(k): majority_interval(answers, k) for k in ks},
        mean_tokens=float(np.mean(lengths)),
        median_tokens=float(np.median(lengths)),
        max_tokens=max(lengths),
        mean_tokens_correct=float(np.mean(lengths_right)) if lengths_right else None,
        share_cut=float(np.mean(cut)),
        outcomes=dict(sorted(outcomes.items())),
        penalties=dict(sorted(penalties.items())),
        by={kind: _by_group(ids_of, correct) for kind, ids_of in groups.items()},
        settings=settings,
    )


RIGHT_ANSWER = "\0right"
"""All right answers vote together, however they are written."""


def vote(verdict: dict[str, Any]) -> str | None:
    """What a graded response votes for in a majority; None where it has no answer."""
    if verdict["correct"]:
        return RIGHT_ANSWER
    return None if verdict["extracted"] is None else answer_key(verdict["extracted"])


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over questions and its interval, clustered by question."""
    low, high = stats.clustered_interval(values)
    return Interval(value=float(np.mean(values)), low=low, high=high)


def _pass_at_k(correct: dict[str, list[bool]], k: int) -> Interval:
    return mean_interval([stats.pass_at_k(len(samples), sum(samples), k) for samples in correct.values()])


def majority_interval(answers: dict[str, list[str | None]], k: int) -> Interval:
    """`answers`: by question; those that are right are RIGHT_ANSWER."""
    return mean_interval([stats.majority_at_k(given, RIGHT_ANSWER, k) for given in answers.values()])


def _by_group(ids_of: dict[str, list[str]], correct: dict[str, list[bool]]) -> dict[str, dict[str, Any]]:
    figures = {}
    for group, ids in sorted(ids_of.items(), key=_numbers_first):
        mean, low, high = stats.accuracy_interval([correct[identity] for identity in ids])
        figures[group] = {"num_questions": len(ids), "pass_at_1": mean, "interval": [low, high]}
    return figures


def _numbers_first(item: tuple[str, Any]) -> tuple[float, str]:
    try:
        return float(item[0]), item[0]
    except ValueError:
        return float("inf"), item[0]
