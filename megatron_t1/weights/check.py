"""`t1 sync-check`: pushes unchanged weights and shows that what the servers say does not move.

The canary of a live cluster. At learning rate 0 nothing may change but the version; a dropped tensor, a wrong cut, a
stale cache or a packed copy that was not renewed all show as moved logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.weights.sync import PushReport, WeightSync


@dataclass(frozen=True)
class SyncCheck:
    max_abs_difference: float
    """Of the logprobs before and after, over the tokens up to the first one that differs."""
    num_diverged: int
    """Samples in which some token differs."""
    num_samples: int
    report: PushReport

    def describe(self) -> str:
        size = f"{self.report.num_bytes / 1e6:.0f} MB"
        return (
            f"version {self.report.version} ({size}) pushed in {self.report.total_s:.2f} s; "
            f"logprobs moved by at most {self.max_abs_difference:.1e} over {self.num_samples} samples, "
            f"{self.num_diverged} of which took another token"
        )


def sync_check(
    sync: WeightSync, client: RolloutClient | None, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 32
) -> SyncCheck | None:
    """Samples, pushes what `sync` holds as the next version, samples with the same seeds, and compares.

    Collective over the trainer's ranks; `client` is on rank 0 and None elsewhere, where the result is None too. The
    servers must hold the same weights as the trainer already.
    """
    sampling = SamplingConfig(temperature=1.0, num_samples=1, max_new_tokens=max_new_tokens)
    before = client.complete_tokens(prompts, sampling, seed=0) if client else None
    report = sync.push(sync.next_version())
    if client is None or before is None:
        return None
    after = client.complete_tokens(prompts, sampling, seed=0)
    worst, diverged = 0.0, 0
    for (old,), (new,) in zip(before, after, strict=True):
        length = min(len(old.token_ids), len(new.token_ids))
        differs = np.flatnonzero(old.token_ids[:length] != new.token_ids[:length])
        same = int(differs[0]) if len(differs) else length
        diverged += bool(len(differs)) or len(old.token_ids) != len(new.token_ids)
        # The first token that differs was drawn from logprobs that are compared through the chosen tokens before it.
        worst = max(worst, float(np.abs(old.logprobs[:same] - new.logprobs[:same]).max(initial=0.0)))
    return SyncCheck(worst, diverged, len(before), report)
