"""The KL to the starting policy against its formula; tests/test_loop.py has the rest, in a real run."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from megatron_t1.config import Config, RLConfig
from megatron_t1.fields import FieldError
from megatron_t1.milestones import log_ratio_metrics


def test_the_kl_to_the_start_is_its_formula() -> None:
    """KL = 1/n sum_i sum_t (log p - log q), in exact arithmetic; its error = std / sqrt(n)."""
    random = np.random.default_rng(0)
    policy = [-random.exponential(1.0, length).astype(np.float32) for length in (1, 7, 300, 5000)]
    start = [(values - random.normal(0.05, 0.2, len(values))).astype(np.float32) for values in policy]
    sums = [
        sum(Fraction(float(p)) - Fraction(float(s)) for p, s in zip(*pair, strict=True))
        for pair in zip(policy, start, strict=True)
    ]
    mean = sum(sums) / 4
    found = log_ratio_metrics(policy, start)
    assert found["kl_start"] == pytest.approx(float(mean), rel=1e-9)
    assert found["kl_start_token"] == pytest.approx(float(sum(sums) / 5308), rel=1e-9)
    variance = sum((each - mean) ** 2 for each in sums) / 3
    assert found["kl_start_error"] == pytest.approx(math.sqrt(float(variance / 4)), rel=1e-9)
    assert log_ratio_metrics(policy, policy)["kl_start"] == 0


def test_measurements_need_questions() -> None:
    with pytest.raises(FieldError, match=r"rl.measure_every = 2 needs data.heldout or evaluate.sets"):
        Config(rl=RLConfig(measure_every=2))
