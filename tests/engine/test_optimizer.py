"""The learning rate of every step, against its formula, and numbers of Adam that would destroy a model."""

from __future__ import annotations

from math import cos, pi
from types import SimpleNamespace

import pytest
import torch

from megatron_t1.engine.config import OptimConfig
from megatron_t1.engine.optimizer import schedule_of
from megatron_t1.fields import FieldError


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


@pytest.mark.parametrize(("eps", "refused"), [(0.0, True), (1e-46, True), (-1e-8, True), (1e-30, False)])
def test_a_weight_that_no_token_reached_stays_a_number(eps: float, refused: bool) -> None:
    """The rows of an untied embedding whose tokens a batch lacks have gradients of 0, whose norm is no warning."""
    if refused:
        with pytest.raises(FieldError, match=r"adam_eps = .* must be at least 1e-30"):
            OptimConfig(lr=1e-3, adam_eps=eps)
        return
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    torch.optim.AdamW([weight], lr=1e-3, eps=OptimConfig(lr=1e-3, adam_eps=eps).adam_eps, weight_decay=0.0).step()
    assert weight.tolist() == [1, 1, 1]


def test_where_a_schedule_ends_is_not_said_of_one_that_stays() -> None:
    with pytest.raises(FieldError, match=r"min_lr_ratio = 0.1 is not read with schedule = constant"):
        OptimConfig(lr=1e-3, min_lr_ratio=0.1)
