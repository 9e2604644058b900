"""Accuracy on held-out questions: k graded samples a question from the servers, every response and verdict kept.

Responses are written as they come, a block of questions at a time, so a cut evaluation goes on with the questions that
are not finished. Left out for now: fetching question sets by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_t1 import stats
from megatron_t1.actors import Actors
from megatron_t1.files import append_jsonl, read_jsonl, write_json
from megatron_t1.metrics import sample_row
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.types import Prompt

_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a checkpoint is evaluated."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95, num_samples=1))
    """Its own sampling: `num_samples` is k, and k > 1 averages over them; temperature 0 is greedy."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    label: str
    num_questions: int
    num_samples: int
    """Samples a question."""
    pass_at_1: float
    """Mean over questions and samples."""
    interval: tuple[float, float]
    """95%; Wilson for one sample a question, clustered by question for more."""
    mean_tokens: float
    """Response tokens."""
    share_cut: float
    """Share of responses that the length limit cut."""
    outcomes: dict[str, int]


def evaluate(
    cfg: EvaluateConfig, actors: Actors, prompts: list[Prompt], out_dir: Path, label: str, seed: int
) -> EvalResult:
    """Evaluate what the servers serve now; writes `responses.jsonl` and `summary.json` to `out_dir/label`."""
    folder = out_dir / label
    path = folder / "responses.jsonl"
    rows = read_jsonl(path)
    finished = {row["id"] for row in rows}
    todo = [prompt for prompt in prompts if prompt.id not in finished]
    blocks = range(0, len(todo), _BLOCK)
    for start in tqdm(blocks, desc=f"evaluate {label}", unit="block", disable=len(blocks) < 2):
        groups = actors.generate(todo[start : start + _BLOCK], cfg.sampling, seed=seed)
        fresh = [sample_row(group, sample) for group in groups for sample in group.samples]
        append_jsonl(path, fresh)
        rows += fresh
    result = summarize(label, rows)
    write_json(folder / "summary.json", asdict(result))
    return result


def summarize(label: str, rows: list[dict[str, Any]]) -> EvalResult:
    correct: dict[str, list[bool]] = {}
    outcomes: dict[str, int] = {}
    for row in rows:
        correct.setdefault(row["id"], []).append(row["reward"]["correct"])
        outcomes[row["reward"]["outcome"]] = outcomes.get(row["reward"]["outcome"], 0) + 1
    mean, low, high = stats.accuracy_interval(list(correct.values()))
    return EvalResult(
        label=label,
        num_questions=len(correct),
        num_samples=len(rows) // len(correct),
        pass_at_1=mean,
        interval=(low, high),
        mean_tokens=float(np.mean([row["num_tokens"] for row in rows])),
        share_cut=float(np.mean([row["finish_reason"] == "length" for row in rows])),
        outcomes=outcomes,
    )
