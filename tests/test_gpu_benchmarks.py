"""`python -m benchmarks.gpu` is right before a GPU is paid for: its smoke mode, but for what starts servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import ROOT, environment

CHECKS = ("machine", "resume", "packing", "step", "head", "memory", "share")


@pytest.mark.usefixtures("forks")  # a tier of its own: each check is a trainer
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--only", ",".join(CHECKS), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["check"] for row in rows} == set(CHECKS)
    assert not [row for row in rows if row["status"] == "FAIL"]


def test_unknown_checks_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "step,steps", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such checks: steps" in done.stderr
