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
    "sequence": {
        "importance": "sequence", "ratio_min": 0.1, "ratio_max": 1.5, "mask": "geometric", "mask_min": 0.55,
    },
    "gspo": {
        "kl_coef": 0.0,
        "importance": "gspo", "ratio_min": 0.8, "ratio_max": 1.03,
        "mask": "sequence", "mask_min": 1e-5, "mask_max": 1.5,
    },
}  # fmt: skip
"""Fields of LossConfig beside or instead of COEFFICIENTS"""
COEFFICIENTS = {"entropy_coef": 0.02, "kl_coef": 0.05}


def make_sequences(vocab_size: int) -> list[TrainSequence]:
    rng = np.random.default_rng(7)
    return [
        TrainSequence(
            prompt_ids=rng.integers(0, vocab_size, rng.integers(1, 9)),
            response_ids=rng.integers(0, vocab_size, length),
            advantage=float(rng.normal()),
            # Of no policy, as off policy, after min_p or in another precision: only the ratios may depend on them.
            rollout_logprobs=rng.uniform(-7, -4.7, length).astype(np.float32),
            group=group,
        )
        for length, group in zip((1, 30, 7, 64, 12, 45, 3, 20, 33), (0, 1, 0, 1, 2, 1, 0, 3, 2), strict=True)
    ]
