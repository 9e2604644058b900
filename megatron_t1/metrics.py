"""What a run writes down while it goes: one JSON line a step (trackers are told it too), sample responses, stage times.

Rank 0 only. Lines are flushed as they are written; a resumed run drops those after its step and goes on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from megatron_t1 import reasoning
from megatron_t1.files import append_jsonl, cut_jsonl
from megatron_t1.trace import Trace
from megatron_t1.types import Group


class _Step(TypedDict):
    """A line of metrics.jsonl or samples.jsonl, as far as its place in the run goes."""

    step: int


class Stopwatch:
    """Seconds by stage: `with watch("train"): ...`; `lap()` hands out what was measured since the last lap."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._trace = trace or Trace()
        self._lap: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.add(stage, ended - began)
            self._trace.span("trainer", stage, began, ended)

    def add(self, stage: str, seconds: float) -> None:
        self._lap[stage] += seconds
        self.total[stage] += seconds

    def lap(self) -> dict[str, float]:
        lap, self._lap = dict(self._lap), defaultdict(float)
        return lap


class MetricsLog:
    """Metrics of one stage of a run (`sft` or `rl`). At the end of its block the trackers are told how that ended."""

    def __init__(
        self, run_dir: Path, stage: str, *, first_step: int = 0, trackers: Sequence[Any] = (), groups_kept: int = 2
    ) -> None:
        """
        Args:
            first_step: lines after this step are of a run that was cut; they are dropped.
            trackers: told the same (`trackers.Tracker`).
            groups_kept: groups whose responses are written down each step.
        """
        folder = run_dir / stage
        self._path, self._samples_path = folder / "metrics.jsonl", folder / "samples.jsonl"
        self._groups_kept = groups_kept
        for path in (self._path, self._samples_path):
            cut_jsonl(path, lambda row: row["step"] > first_step, _Step)
        self._trackers = trackers

    def log(self, step: int, values: dict[str, float]) -> None:
        append_jsonl(self._path, [{"step": step, **values}])
        for tracker in self._trackers:
            tracker.log(step, values)

    def samples(self, step: int, groups: list[Group]) -> None:
        rows = [sample_row(group, sample) for group in groups[: self._groups_kept] for sample in group.samples]
        append_jsonl(self._samples_path, ({"step": step, **row} for row in rows))
        for tracker in self._trackers:
            tracker.table(step, rows)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for tracker in self._trackers:
            tracker.close(error)


def sample_row(group: Group, sample: Any) -> dict[str, Any]:
    """A graded sample as a JSON object: what was asked and answered, every part of the reward and its reason."""
    return {
        "id": group.prompt.id,
        "prompt": group.prompt.text,
        "gold": group.prompt.gold,
        "response": sample.text,
        "num_tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "weight_versions": sample.weight_versions,
        "reward": asdict(sample.reward) if sample.reward else None,
        "advantage": sample.advantage,
    }


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """A step's samples in numbers: reward and its parts, lengths and words of reasoning (a response, in the mean),
    groups that teach nothing, penalties by kind."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = np.array([len(sample.token_ids) for sample in samples])
    equal = [len({sample.reward.value for sample in group.samples if sample.reward}) == 1 for group in groups]
    metrics = {
        "reward": float(np.mean([reward.value for reward in rewards])),
        "pass_rate": float(np.mean([reward.correct for reward in rewards])),
        "groups_all_equal": float(np.mean(equal)),
        # What K samples of an all-equal group cost and did not teach.
        "tokens_all_equal": float(
            sum(len(s.token_ids) for g, e in zip(groups, equal, strict=True) if e for s in g.samples)
        ),
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "share_cut": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "penalized": float(np.mean([bool(reward.penalties) for reward in rewards])),
        "grading_seconds_max": max(reward.seconds for reward in rewards),
        "num_samples": float(len(samples)),
        "num_response_tokens": float(lengths.sum()),
        "oldest_version": float(min(span[0] for sample in samples for span in sample.weight_versions)),
    }
    words = [reasoning.count(sample.text) for sample in samples]
    for habit in reasoning.HABITS:
        metrics[f"words/{habit}"] = float(np.mean([each[habit] for each in words]))
    right = np.array([reward.correct for reward in rewards])
    total = np.array([sum(each.values()) for each in words])
    for name, chosen in (("right", right), ("wrong", ~right)):
        if chosen.any():  # no sample, no mean
            metrics[f"response_tokens_{name}"] = float(lengths[chosen].mean())
            metrics[f"words_{name}"] = float(total[chosen].mean())
    for outcome in ("wrong", "no_answer", "timeout", "crash"):
        metrics[f"outcome/{outcome}"] = float(np.mean([reward.outcome == outcome for reward in rewards]))
    for name in sorted({name for reward in rewards for name in reward.penalties}):
        metrics[f"penalty/{name}"] = float(np.mean([name in reward.penalties for reward in rewards]))
    return metrics


def staleness(groups: list[Group], version: int) -> float:
    """By how many versions the weights that made a token are older than `version`, as a mean over tokens."""
    spans = [span for group in groups for sample in group.samples for span in sample.weight_versions]
    num_tokens = sum(end - start for _, start, end in spans)
    return sum((version - made_by) * (end - start) for made_by, start, end in spans) / num_tokens
