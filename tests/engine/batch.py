"""The batch that every layout and the reference see."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_t1.types import TrainSequence

TEMPERATURE = 1.2
LOSSES: dict[str, dict[str, Any]] = {
    "rl": {},
    "batch_kl": {"kl_baseline": "batch"},
    "plain_kl": {"kl_baseline": "none"},
    "full_kl": {"kl_estimator": "full"},
    "clipped": {"kl_estimator": "k3", "clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
    "truncated": {"kl_estimator": "k3_score", "tis_cap": 2.0},
}
"""Fields of LossConfig beside these coefficients"""
ENTROPY_COEF, KL_COEF = 0.02, 0.05


def make_sequences(vocab_size: int) -> list[TrainSequence]:
    rng = np.random.default_rng(7)
    return [
        TrainSequence(
            prompt_ids=rng.integers(0, vocab_size, rng.integers(1, 9)),
            response_ids=rng.integers(0, vocab_size, length),
            advantage=float(rng.normal()),
            # Of no policy, as after min_p or in another precision: nothing but the ratio may depend on them.
            rollout_logprobs=rng.uniform(-8, -1, length).astype(np.float32),
            group=group,
        )
        for length, group in zip((1, 30, 7, 64, 12, 45, 3, 20, 33), (0, 1, 0, 1, 2, 1, 0, 3, 2), strict=True)
    ]
