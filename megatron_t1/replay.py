"""Train a step of a run once more, from its checkpoint and its stored samples, without servers: to look into it.

On the run's layout the step comes out bit by bit as it did; on another within rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_t1.config import Config
from megatron_t1.engine import checkpoint
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.files import iter_jsonl
from megatron_t1.learner import Learner
from megatron_t1.metrics import Stopwatch
from megatron_t1.platform.detect import Platform
from megatron_t1.rl import batches_of
from megatron_t1.rollout.batches import Batches, stored
from megatron_t1.types import Prompt
from megatron_t1.weights.plan import Plan


class _Row(TypedDict):
    step: int


@dataclass(frozen=True)
class Replayed:
    """A step's metrics, those that depend on no clock."""

    step: int
    now: dict[str, float]
    before: dict[str, float]
    """The run's line in metrics.jsonl; {} when it has none."""

    def table(self) -> str:
        """What differs, and a verdict."""
        shared = sorted(self.now.keys() & self.before.keys())
        differing = [name for name in shared if not _same(self.now[name], self.before[name])]
        lines = [f"{'metric':<28} {'run':>16} {'replayed':>16} {'relative':>10}"] if differing else []
        for name in differing:
            now, before = self.now[name], self.before[name]
            lines.append(f"{name:<28} {before:>16.9g} {now:>16.9g} {abs(now - before) / abs(before or 1):>10.1e}")
        if not self.before:
            lines.append(f"step {self.step} has no line in the run's metrics.jsonl")
        elif not differing:
            lines.append(f"step {self.step}: all {len(shared)} metrics are the run's, bit by bit")
        else:
            lines.append(f"step {self.step}: {len(shared) - len(differing)} of {len(shared)} metrics are bit-equal")
        return "\n".join(lines)


def replay(cfg: Config, platform: Platform, prompts: list[Prompt], step: int, profile_to: Path | None) -> Replayed:
    """Collective. Train up to `step` (counted from 1) of the run in `cfg.run_dir`, which is left as it is.

    Args:
        profile_to: file for torch's profile of that step on rank 0, to be opened in Perfetto; None: no profile.

    Raises:
        ValueError: no checkpoint before the step, or its samples are not stored any more; it says what is.
    """
    folder = Path(cfg.run_dir) / "rl"
    learner = Learner(cfg, platform, Stopwatch())
    batches = batches_of(cfg, prompts, folder)
    _load_before(learner, step)
    metrics: dict[str, float] = {}
    while learner.steps_done < step:
        number = learner.steps_done
        weights = from_main(_weights_of(batches, number) if is_main() else None)
        if number == 0 and weights != Plan(learner.engine.pieces()).fingerprint():
            raise ValueError(
                f"the samples of step 1 were made by other weights than model.hf_path = {cfg.model.hf_path}, or by "
                "another release: name the folder that RL began with by --model.hf_path (t1 run: run_dir/sft/hf)"
            )
        groups = from_main(
            batches.make(number, weights, stored(cfg.sampling, cfg.rollout)).groups if is_main() else None
        )
        with contextlib.ExitStack() as stack:
            if profile_to and learner.steps_done == step - 1:
                stack.enter_context(_profiled(profile_to))
            metrics = learner.learn(groups)
            learner.follow()
    lines = iter_jsonl(folder / "metrics.jsonl", _Row) if is_main() else iter(())
    return Replayed(step, metrics, next((row for row in lines if row["step"] == step), {}))


def _load_before(learner: Learner, step: int) -> None:
    paths = from_main(checkpoint.finished(learner.checkpoints) if is_main() else None)
    newest = checkpoint.newest_whole([path for path in paths if checkpoint.step_of(path) < step])
    if newest:
        learner.steps_done = int(checkpoint.load(newest, learner.engine, learner.anchor)["step"])


def _weights_of(batches: Batches, number: int) -> str:
    weights = batches.bank.weights_of(number)
    if weights is None:
        there = batches.bank.steps()
        kept = f"steps {there[0] + 1} to {there[-1] + 1} are" if there else "none is"
        raise ValueError(
            f"the samples of step {number + 1} are not stored in {batches.bank.folder}; {kept}. They are kept as long "
            "as one of the newest rl.checkpoint.keep checkpoints is older"
        )
    return weights


@contextlib.contextmanager
def _profiled(path: Path) -> Iterator[None]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
