"""A stop between two microbatches: on every rank the same, none hangs, and of the step nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.forks import WORKERS
from tests.tiny import make_tiny_qwen2

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2 overlap": {"overlap_grad_reduce": True},
    "PP2": {"pipeline": 2},
    "PP2 in two chunks": {"pipeline": 2, "virtual_pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pass_is_cut_off_between_two_microbatches(layout: dict[str, Any], run_ranks: Any, tmp_path: Path) -> None:
    model_dir = make_tiny_qwen2(tmp_path, num_layers=4)
    layout = json.dumps({"max_tokens_per_microbatch": 80, **layout})
    run_ranks(WORKERS / "cut_worker.py", 2, model_dir, layout, 2)
