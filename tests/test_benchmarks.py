"""The benchmarks that take seconds run, and those that only compute print the tables that their pages show."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.forks import ROOT, environment


@pytest.mark.parametrize(
    ("command", "num_rows"), [("step_time", 22), ("memory --plan", 6), ("memory --lengths", 10)], ids=str
)
def test_a_computed_table_is_the_page_s(command: str, num_rows: int) -> None:
    rows = _table(command)
    assert len(rows) == num_rows
    page = (ROOT / "benchmarks" / f"{command.split()[0]}.md").read_text().splitlines()
    assert set(rows) <= set(page)


@pytest.mark.parametrize("command", ["packing", "long_samples"])
def test_a_measured_table_has_the_page_s_rows(command: str) -> None:
    page = (ROOT / "benchmarks" / f"{command}.md").read_text().splitlines()
    assert [row.split("|")[1] for row in _table(command)] == [row.split("|")[1] for row in page if row.startswith("|")]


def _table(command: str) -> list[str]:
    run = [sys.executable, "-m", *f"benchmarks.{command}".split()]
    done = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("|")]
