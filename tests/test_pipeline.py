"""What the jobs bring up, and what they say in the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_t1.cli.options import read
from megatron_t1.config import Config
from megatron_t1.files import read_json, write_json
from megatron_t1.metrics import Stopwatch
from megatron_t1.pipeline import _summarize
from tests.tiny import make_tiny_qwen2


def test_curation_by_a_model_without_weights_is_refused_before_its_servers_start(t1: Any, tmp_path: Path) -> None:
    """vLLM would begin with random ones, for a push that has nothing to push."""
    model, raw = make_tiny_qwen2(tmp_path / "model"), tmp_path / "raw.jsonl"
    (model / "model.safetensors").unlink()
    raw.write_text(json.dumps({"problem": "How many are 1 and 1?", "answer": "2"}) + "\n")
    words = ("--run_dir", tmp_path / "run", "--model.hf_path", model, "--curate.inputs", f"[{raw}]")
    assert "safetensors" in t1("curate", *words, expect=1)
    assert (tmp_path / "run/curate/candidates.jsonl").read_text()
    assert not (tmp_path / "run/logs").exists(), "a server was started"


def test_a_run_that_others_began_is_summed_up_with_what_there_is(tmp_path: Path) -> None:
    """SFT and RL by their own commands, or before data.heldout was another: nothing was measured before RL."""
    (tmp_path / "new.jsonl").touch()
    cfg = read(Config, ["--run_dir", str(tmp_path / "run"), "--data.heldout", str(tmp_path / "new.jsonl")])
    for path, value in (
        ("evaluate/rl/new/summary.json", {"pass_at_1": 0.5}),
        ("evaluate/sft/old/summary.json", {"pass_at_1": 0.25}),
        ("scaling/rl/points.json", [{"budget": 8, "accuracy": 0.125}]),
    ):
        write_json(tmp_path / "run" / path, value)
    _summarize(cfg, Stopwatch(), Stopwatch(), time.perf_counter())
    summary = read_json(tmp_path / "run/summary.json")
    assert (summary["sft_pass_at_1"], summary["rl_pass_at_1"]) == (None, 0.5)
    assert summary["scaling"] == [[8, 0.125]]
