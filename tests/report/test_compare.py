"""`t1 report A B`: what runs have is laid beside each other; what differs in their settings is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megatron_t1.evaluation.figures import summarize
from megatron_t1.files import write_json, write_jsonl, write_text
from megatron_t1.report.compare import _interval, write_comparison
from tests.report.test_report import Page, row


def a_run(folder: Path, rate: float, right: int) -> Path:
    write_text(folder / "config.yaml", f"run_dir: {folder}\nrl: {{steps: 60, optim: {{lr: {rate}}}}}\nseed: 0\n")
    steps = [{"step": i, "reward": rate * i, "entropy": 1.0, "penalty/overlong": 0.1} for i in range(1, 61)]
    for i in (0, 20, 40):
        steps[i] |= {"kl_start": i / 10, "heldout/set": 0.5}
    write_jsonl(folder / "rl/metrics.jsonl", steps)
    rows = [row(str(i), "<b>text</b>", i < right) for i in range(40)]
    write_jsonl(folder / "evaluate/after/heldout/responses.jsonl", rows)
    summary = summarize("after", "heldout", rows, {"step": 60})
    write_json(folder / "evaluate/after/heldout/summary.json", asdict(summary))
    return folder


def test_runs_beside_each_other(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / f"{name}/run", rate, right) for name, rate, right in (("a", 1e-3, 10), ("<b>", 2e-3, 30))]
    page = Page(write_comparison(runs).read_text())
    assert not page.open
    assert "a/run · <b>/run" in page.text, "called by what tells their paths apart, as text"
    cells = [line for line in page.text.splitlines() if line.startswith("rl.optim.lr")]
    assert cells == ["rl.optim.lr0.0010.002"]
    assert "seed" not in page.text
    assert "run_dir" not in page.text
    assert "+50.0 points" in page.text
    plots = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    measured = ["Reward against KL to the starting policy", "heldout/set"]
    assert plots == [*measured, "reward", "entropy", "kl_start"]
    assert "reward0.036 ±\N{NO-BREAK SPACE}0.020" in page.text


def test_runs_whose_names_begin_with_a_line_are_compared(tmp_path: Path) -> None:
    assert write_comparison([a_run(tmp_path / name, 1e-3, 10) for name in ("_a", "_b")]).is_file()


def test_an_interval_is_that_of_blocks() -> None:
    noise = np.random.default_rng(0).standard_normal((400, 50))
    inside = 0
    for values in noise:
        mean, _, half = _interval(values).partition(" ±")
        inside += abs(float(mean)) <= float(half)
    assert 0.92 < inside / 400 < 0.98
    assert _interval(np.ones(3)) == "1"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a", 1e-3, 1)
    with pytest.raises(ValueError, match="the same folder"):
        write_comparison([run, tmp_path / "a/../a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no results"):
        write_comparison([run, tmp_path / "empty"])
    with pytest.raises(ValueError, match="nothing is not there"):
        write_comparison([run, tmp_path / "nothing"])
