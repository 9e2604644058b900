from __future__ import annotations

import json
from typing import Any

import pytest

from tests.forks import WORKERS
from tests.tiny import make_tiny_qwen2, make_tiny_qwen3_moe

CASES: dict[str, tuple[Any, dict[str, Any], float, str]] = {
    "DP2, shared optimizer": (make_tiny_qwen2, {"distributed_optimizer": True}, 1.0, "bfloat16"),
    "DP2, not clipped": (make_tiny_qwen2, {"distributed_optimizer": False}, 0.0, "float32"),
    "PP2": (make_tiny_qwen2, {"pipeline": 2}, 1.0, "bfloat16"),
    "EP2": (make_tiny_qwen3_moe, {"expert": 2}, 1.0, "float32"),
}


@pytest.mark.parametrize(("make", "layout", "clip_grad", "dtype"), CASES.values(), ids=CASES)
def test_a_gradient_that_is_not_finite_changes_nothing(
    make: Any, layout: dict[str, Any], clip_grad: float, dtype: str, run_ranks: Any, tmp_path: Any
) -> None:
    run_ranks(WORKERS / "skip_worker.py", 2, make(tmp_path), json.dumps(layout), clip_grad, dtype)
