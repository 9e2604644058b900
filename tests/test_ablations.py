"""The ablations' files and their table; runs of them are a benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.ablations import (
    BASE,
    ROWS,
    differences,
    interval,
    results,
    rl_options,
    sft_file,
    sft_options,
    table,
    words,
)
from megatron_t1.cli.options import read
from megatron_t1.config import Config, keep
from tests.forks import ROOT


@pytest.mark.parametrize("base", [BASE, ROOT / "examples/qwen2.5-14b/rl.yaml"], ids=lambda path: path.parent.name)
def test_every_row_changes_one_thing_over_any_base(base: Path) -> None:
    plain = read(Config, ["--config", str(base), "--config", str(ROWS / "base.yaml")])
    for path in ROWS.glob("*.yaml"):
        row = read(Config, ["--config", str(base), "--config", str(path)])
        changed = [name for name in vars(plain) if getattr(row, name) != getattr(plain, name)]
        assert len(changed) == (path.stem not in ("base", "k64" if plain.sampling.num_samples == 64 else "")), path.stem
    assert sft_file("sft_right_only") == "sft_right_only.jsonl"
    assert sft_file("k4") == "sft.jsonl"


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    asked = rl_options(tmp_path, "k4", 1, 40, "sft.jsonl")
    assert differences(*asked) == []
    cfg = read(
        Config, words(*asked, {"rollout.urls": "[http://127.0.0.1:1]", "rollout.key_file": "key", "resume": "false"})
    )
    keep(cfg)
    assert differences(*asked) == []
    assert differences(*rl_options(tmp_path, "k4", 1, 80, "sft.jsonl")) == [], "a run that may go on"
    keep(replace(cfg, sampling=replace(cfg.sampling, num_samples=5), loss=replace(cfg.loss, kl_coef=0.5)))
    assert [line.partition(": ")[2] for line in differences(*asked)] == [
        "loss.kl_coef was 0.5, and is 0.02",
        "sampling.num_samples was 5, and is 4",
    ]
    keep(read(Config, words(*sft_options(tmp_path, "sft_right_only.jsonl", 4000))))
    assert differences(*sft_options(tmp_path, "sft_right_only.jsonl", 4000)) == []
    (line,) = differences(*sft_options(tmp_path, "sft_right_only.jsonl", 300))
    assert line.endswith("sft.max_steps was 4000, and is 300")


def test_intervals_are_students_and_differences_are_paired(tmp_path: Path) -> None:
    """Against the formula: mean +- t(0.975, n - 1) std / sqrt(n)."""
    accuracy = {"base": [0.8, 0.9, 0.85], "k4": [0.7, 0.86, 0.8]}
    for row, values in accuracy.items():
        for seed, value in enumerate(values):
            run_dir = tmp_path / row / f"seed_{seed}"
            for step, result in ((0, 0.5), (4, value)):
                folder = run_dir / f"evaluate/step_{step:06d}/heldout"
                folder.mkdir(parents=True)
                (folder / "summary.json").write_text(json.dumps({"pass_at_1": result}))
            line = {"step": 4, "response_tokens_mean": 40, "share_cut": 0, "penalized": 0, "entropy": 0.1}
            line |= {"tokens_all_equal": 10, "num_response_tokens": 40}
            (run_dir / "rl").mkdir()
            later = {**line, "step": 9, "entropy": 9}  # of a run that went on
            (run_dir / "rl/metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(later)}\n")
    found = table({row: results(tmp_path, row, 4) for row in accuracy})
    difference = np.array(accuracy["k4"]) - np.array(accuracy["base"])
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / 3**0.5
    low, high = difference.mean() - half, difference.mean() + half
    assert f"| {difference.mean():+.3f} ({low:+.3f} to {high:+.3f}) | 0.5 | 40 | 0 | 0 | 0.1 | 0.25 |" in found
    assert interval([0.5], ".3f") == "0.500"
