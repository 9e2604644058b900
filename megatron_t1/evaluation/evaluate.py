"""Accuracy on question sets: k graded samples a question, every response and verdict kept.

    for every set: what responses.part.jsonl lacks -> sampler -> graded rows, as they come -> responses.jsonl, summary

A resumed evaluation asks only for the samples that are missing, with the seeds that they would have had, and ends with
the same files. What its settings say (weights, sampling, seed, questions, grader) must be the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_t1.config import Config
from megatron_t1.data.prompts import Question
from megatron_t1.data.sets import load_set, set_name
from megatron_t1.evaluation import stats
from megatron_t1.evaluation.config import EvaluateConfig
from megatron_t1.evaluation.resume import collecting, open_folder
from megatron_t1.evaluation.samplers import Ask, Response, Sampler
from megatron_t1.files import iter_jsonl, sort_jsonl, write_json


def question_sets(cfg: Config, named: Sequence[str]) -> dict[str, list[Question]]:
    """The questions of the sets and files in `named` (empty names count as none) or of `data.heldout`, by set name.

    Raises:
        ValueError: as `load_set` does, or there is neither, or two would have the same name.
    """
    names = [name for name in named if name] or [str(cfg.data.need("heldout"))]
    if twice := [name for name, count in Counter(map(set_name, names)).items() if count > 1]:
        raise ValueError(f"several of {names} would be called {', '.join(twice)}: give the files other names")
    sets_dir = Path(cfg.evaluate.sets_dir) if cfg.evaluate.sets_dir else None
    return {
        set_name(name): load_set(
            name,
            sets_dir=sets_dir,
            seed=cfg.seed,
            instruction=cfg.evaluate.instruction,
            system_prompt=cfg.data.system_prompt,
        )
        for name in names
    }


@dataclass(frozen=True, kw_only=True)
class Estimate:
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
    pass_at_k: dict[str, Estimate]
    """k -> at least one of k is right; the unbiased estimator of Chen et al. (2021), averaged over questions."""
    majority_at_k: dict[str, Estimate]
    """k -> the most frequent answer of k is right, ties drawn for; wrong answers are told apart by their text."""
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


def evaluate(
    cfg: EvaluateConfig,
    sampler: Sampler,
    questions: Sequence[Question],
    out_dir: Path,
    label: str,
    set_name: str,
    settings: dict[str, Any],
    seed: int,
    *,
    resume: bool = False,
    replace_other: bool = False,
) -> EvalResult:
    """Evaluate on one set; writes `responses.jsonl` and `summary.json` to `out_dir/label/set_name`.

    Args:
        settings: what decides the responses beside sampling, seed and questions: the weights, the grader.
        resume: keep the samples of an earlier run with the same settings.
        replace_other: an earlier run with other settings is replaced; otherwise it is an error.

    Raises:
        ValueError: the folder holds another evaluation, or this one and `resume` is not given.
    """
    folder, sampling = out_dir / label / set_name, cfg.sampling_of(set_name)
    path, part = folder / "responses.jsonl", folder / "responses.part.jsonl"
    settings = {**settings, "sampling": asdict(sampling), "seed": seed, "questions": questions_digest(questions)}
    open_folder(folder, settings, resume=resume, replace_other=replace_other)
    if not path.exists():
        have = {(row["id"], row["sample"]) for row in iter_jsonl(part)}
        asks = [ask for question in questions for ask in missing(question, sampling.num_samples, have)]
        num_missing = sum(ask.count for ask in asks)
        with collecting(
            part, f"evaluate {label} {set_name}", unit="response", num_kept=len(have), num_missing=num_missing
        ) as add:
            sampler.sample(
                asks,
                sampling,
                seed,
                lambda question, first, responses: add(
                    (response_row(question, first + j, response) for j, response in enumerate(responses)),
                    sum(response.num_tokens for response in responses),
                ),
            )
        place = {question.id: i for i, question in enumerate(questions)}
        sort_jsonl(part, path, key=lambda row: (place[row["id"]], row["sample"]))
    result = summarize(label, set_name, iter_jsonl(path), settings)
    write_json(folder / "summary.json", asdict(result))
    part.unlink(missing_ok=True)
    return result


def questions_digest(questions: Sequence[Question]) -> str:
    """What was asked, as a short digest."""
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()[:16]


def missing(question: Question, num_samples: int, have: set[tuple[str, int]]) -> Iterable[Ask]:
    """Runs of samples that are not there yet."""
    first = None
    for number in range(num_samples + 1):
        absent = number < num_samples and (question.id, number) not in have
        if absent and first is None:
            first = number
        elif not absent and first is not None:
            yield Ask(question, first, number - first)
            first = None


def response_row(question: Question, number: int, response: Response) -> dict[str, Any]:
    """A line of responses.jsonl. No times in it: an interrupted evaluation ends with the same file."""
    reward = asdict(response.reward)
    del reward["seconds"]
    return {
        "id": question.id,
        "sample": number,
        "prompt": question.text,
        "gold": question.gold,
        "level": question.meta.get("level"),
        "subject": question.meta.get("subject"),
        "response": response.text,
        "num_tokens": response.num_tokens,
        "finish_reason": response.finish_reason,
        "reward": reward,
    }


def summarize(label: str, set_name: str, rows: Iterable[dict[str, Any]], settings: dict[str, Any]) -> EvalResult:
    """Every figure of an evaluation from its rows."""
    correct: dict[str, list[bool]] = {}
    answers: dict[str, list[str | None]] = {}
    groups: dict[str, dict[str, list[str]]] = {"level": {}, "subject": {}}
    outcomes: dict[str, int] = {}
    penalties: dict[str, int] = {}
    lengths, cut, right = [], [], []
    for row in rows:
        identity, reward = row["id"], row["reward"]
        if identity not in correct:
            for name, found in groups.items():
                if row.get(name) is not None:
                    found.setdefault(str(row[name]), []).append(identity)
        correct.setdefault(identity, []).append(reward["correct"])
        answers.setdefault(identity, []).append(_RIGHT if reward["correct"] else reward["extracted"])
        outcomes[reward["outcome"]] = outcomes.get(reward["outcome"], 0) + 1
        for name in reward["penalties"]:
            penalties[name] = penalties.get(name, 0) + 1
        lengths.append(row["num_tokens"])
        cut.append(row["finish_reason"] == "length")
        right.append(reward["correct"])
    num_samples = len(lengths) // len(correct)
    mean, low, high = stats.accuracy_interval(list(correct.values()))
    ks = [k for k in (2**i for i in range(1, 10)) if k <= num_samples]
    return EvalResult(
        label=label,
        set=set_name,
        num_questions=len(correct),
        num_samples=num_samples,
        pass_at_1=mean,
        interval=(low, high),
        interval_method=stats.interval_method(num_samples),
        pass_at_k={str(k): estimate([stats.pass_at_k(len(c), sum(c), k) for c in correct.values()]) for k in ks},
        majority_at_k={str(k): estimate([stats.majority_at_k(a, _RIGHT, k) for a in answers.values()]) for k in ks},
        mean_tokens=float(np.mean(lengths)),
        median_tokens=float(np.median(lengths)),
        max_tokens=max(lengths),
        mean_tokens_correct=float(np.mean([n for n, r in zip(lengths, right, strict=True) if r]))
        if any(right)
        else None,
        share_cut=float(np.mean(cut)),
        outcomes=dict(sorted(outcomes.items())),
        penalties=dict(sorted(penalties.items())),
        by={
            name: {group: _group([correct[i] for i in ids]) for group, ids in sorted(found.items(), key=_numbers_first)}
            for name, found in groups.items()
        },
        settings=settings,
    )


_RIGHT = "\0right"
"""All right answers vote together, however they are written."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean over questions and its interval, clustered by question."""
    low, high = stats.clustered_interval(values)
    return Estimate(value=float(np.mean(values)), low=low, high=high)


def _group(correct: list[list[bool]]) -> dict[str, Any]:
    mean, low, high = stats.accuracy_interval(correct)
    return {"num_questions": len(correct), "pass_at_1": mean, "interval": [low, high]}


def _numbers_first(item: tuple[str, Any]) -> tuple[float, str]:
    try:
        return float(item[0]), item[0]
    except ValueError:
        return float("inf"), item[0]
