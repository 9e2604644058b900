"""What a run writes down while it goes: one JSON line and TensorBoard scalars a step, sample responses, stage times.

Rank 0 only. Lines are flushed as they are written; a resumed run drops those after its step and goes on.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_t1.files import read_jsonl, write_jsonl
from megatron_t1.types import Group


class Stopwatch:
    """Seconds by stage: `with watch("train"): ...`; `lap()` hands out what was measured since the last lap."""

    def __init__(self) -> None:
        self._lap: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._lap[stage] += seconds
            self.total[stage] += seconds

    def lap(self) -> dict[str, float]:
        lap, self._lap = dict(self._lap), defaultdict(float)
        return lap


class MetricsLog:
    """Metrics of one stage of a run (`sft` or `rl`)."""

    def __init__(self, run_dir: Path, stage: str, *, first_step: int = 0, groups_kept: int = 2) -> None:
        """
        Args:
            first_step: lines after this step are of a run that was cut; they are dropped.
            groups_kept: groups whose responses are written down each step.
        """
        folder = run_dir / stage
        self._path, self._samples_path = folder / "metrics.jsonl", folder / "samples.jsonl"
        self._groups_kept = groups_kept
        for path in (self._path, self._samples_path):
            write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= first_step])
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard" / stage), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._append(self._path, {"step": step, **values})
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def samples(self, step: int, groups: list[Group]) -> None:
        for group in groups[: self._groups_kept]:
            for sample in group.samples:
                self._append(self._samples_path, {"step": step, **sample_row(group, sample)})

    def close(self) -> None:
        self._tensorboard.close()

    @staticmethod
    def _append(path: Path, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
