"""The learning rate of every step, against its formula."""

from __future__ import annotations

from math import cos, pi
from types import SimpleNamespace

import pytest

from megatron_t1.engine.config import OptimConfig
from megatron_t1.engine.optimizer import schedule_of


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"schedule": "cosine"}, [(1 + cos(pi * i / 5)) / 2 for i in range(5)]),
        ({"schedule": "linear"}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, [1, 0.9, 0.8, 0.7, 0.6]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "constant"}, [1] * 5),
        ({"schedule": "constant", "warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_the_peak_is_used_and_the_last_step_learns(given: dict, rates: list[float]) -> None:
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = schedule_of(OptimConfig(lr=2.0, **given), optimizer, 5)
    found = []
    for _ in rates:
        schedule.step(increment=1)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([2 * rate for rate in rates])
