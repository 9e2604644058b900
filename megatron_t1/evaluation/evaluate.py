"""Accuracy on question sets: k graded samples a question, every response and verdict kept.

    for every set: what responses.part.jsonl lacks -> sampler -> graded rows, as they come -> responses.jsonl, summary

A resumed evaluation asks only for the samples that are missing, with the seeds that they would have had, and ends with
the same files. What its settings say (weights, prompts, sampling, seed, questions, grader) must be the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_t1.data.prompts import Question
from megatron_t1.evaluation.figures import EvalResult, summarize
from megatron_t1.evaluation.resume import ResponseRow, collecting, open_folder
from megatron_t1.evaluation.samplers import Ask, Response, Sampler
from megatron_t1.files import iter_jsonl, sort_jsonl, write_json
from megatron_t1.rollout.config import SamplingConfig


def evaluate(
    sampler: Sampler,
    questions: Sequence[Question],
    folder: Path,
    sampling: SamplingConfig,
    settings: dict[str, Any],
    seed: int,
    *,
    resume: bool = False,
    replace_other: bool = False,
) -> EvalResult:
    """Evaluate on one set; writes `responses.jsonl` and `summary.json`.

    Args:
        folder: `.../<label>/<set>`: whose result it is, and of which set.
        settings: what decides the responses beside prompts, sampling, seed and questions: the weights, the grader.
        resume: keep the samples of an earlier run with the same settings.
        replace_other: an earlier run with other settings is replaced; otherwise it is an error.

    Raises:
        ValueError: the folder holds another evaluation, or this one and `resume` is not given; or the endpoint refused
            all that it was asked.
    """
    label, set_name = folder.parent.name, folder.name
    path, part = folder / "responses.jsonl", folder / "responses.part.jsonl"
    settings = {**settings, **sampler.identity(questions), "sampling": sampling.identity(), "seed": seed}
    settings["questions"] = questions_digest(questions)
    open_folder(folder, settings, resume=resume, replace_other=replace_other)
    if not path.exists():
        have = {(row["id"], row["sample"]) for row in iter_jsonl(part, ResponseRow)}
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
        outcomes = [row["reward"]["outcome"] for row in iter_jsonl(part, ResponseRow)]
        if set(outcomes) == {"refused"}:
            reason = next(iter_jsonl(part, ResponseRow))["reward"]["reason"]
            part.unlink()  # what a resumed evaluation asks again
            raise ValueError(f"{label} {set_name}: all {len(outcomes)} requests were refused, the first one: {reason}")
        number_of = {question.id: number for number, question in enumerate(questions)}
        sort_jsonl(part, path, key=lambda row: (number_of[row["id"]], row["sample"]))
    result = summarize(label, set_name, iter_jsonl(path, ResponseRow), settings)
    write_json(folder / "summary.json", asdict(result))
    part.unlink(missing_ok=True)
    return result


def questions_digest(questions: Sequence[Question]) -> str:
    """What was asked, as a short digest; a table's columns may hold dates and the like."""
    rows = json.dumps([asdict(question) for question in questions], default=str)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


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


def _group(value: Any) -> str | None:
    return None if value is None else str(value)


def response_row(question: Question, number: int, response: Response) -> dict[str, Any]:
    """A line of responses.jsonl. No times in it: an interrupted evaluation ends with the same file."""
    reward = asdict(response.reward)
    del reward["seconds"]
    return {
        "id": question.id,
        "sample": number,
        "prompt": question.text,
        "gold": question.gold,
        "level": _group(question.meta.get("level")),
        "subject": _group(question.meta.get("subject")),
        "response": response.text,
        "num_tokens": response.num_tokens,
        "finish_reason": response.finish_reason,
        "reward": reward,
    }
