"""Accuracy on held-out questions: k graded samples a question from the servers, every response and verdict kept.

Responses are written as they come, a block of questions at a time, so a resumed evaluation asks only the blocks that
are not finished, with the seeds that they would have had. Left out for now: fetching question sets by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_t1 import stats
from megatron_t1.actors import Actors
from megatron_t1.files import append_jsonl, read_jsonl, write_json, write_jsonl
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
    cfg: EvaluateConfig,
    actors: Actors,
    prompts: list[Prompt],
    out_dir: Path,
    label: str,
    seed: int,
    *,
    resume: bool = False,
) -> EvalResult:
    """Evaluate what the servers serve now; writes `responses.jsonl` and `summary.json` to `out_dir/label`.

    Args:
        resume: keep the finished blocks of an evaluation of the same weights, sampling and seed. Any other is replaced.
    """
    folder = out_dir / label
    path, settings_path = folder / "responses.jsonl", folder / "settings.json"
    settings = {
        "model": str(actors.servers.model_dir),
        "weight_version": max(server.version for server in actors.servers.all),
        "sampling": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(cfg.sampling).items()},
        "seed": seed,
    }
    stored: dict[str, list[dict[str, Any]]] = {}
    if resume and settings_path.exists() and json.loads(settings_path.read_text()) == settings:
        for row in read_jsonl(path):
            stored.setdefault(row["id"], []).append(row)
    blocks = [prompts[start : start + _BLOCK] for start in range(0, len(prompts), _BLOCK)]
    finished = [all(len(stored.get(p.id, ())) == cfg.sampling.num_samples for p in block) for block in blocks]
    rows = [row for block, done in zip(blocks, finished, strict=True) if done for p in block for row in stored[p.id]]
    write_jsonl(path, rows)
    write_json(settings_path, settings)
    for number, block in enumerate(tqdm(blocks, desc=f"evaluate {label}", unit="block", disable=len(blocks) < 2)):
        if finished[number]:
            continue
        groups = actors.generate(block, cfg.sampling, seed=seed + number)
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
