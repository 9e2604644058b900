"""One process at a time in a folder: real processes that are at work, killed, or race for what one has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_t1.lock import FILE, locked
from tests.forks import ROOT, environment

HOLD = """
import sys, time
from pathlib import Path
from megatron_t1.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("at work", flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print(error, flush=True)
"""


def hold(folder: Path, seconds: float = 60.0, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)],
        cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def of_another_host(folder: Path, *, age_s: float = 0.0, **fields: object) -> None:
    """What a process elsewhere has written, and touched so long ago."""
    owner = {
        "host": "elsewhere",
        "boot": "b",
        "processes": "pid:[1]",
        "process": 7,
        "started": 1,
        "job": "",
        "turn": "",
    }
    (folder / FILE).write_text(json.dumps({**owner, **fields}))
    then = time.time() - age_s
    os.utime(folder / FILE, (then, then))


def test_the_second_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = hold(tmp_path, 1.0)
    assert first_line(first) == "at work"
    with (
        pytest.raises(ValueError, match=f"in use: process {first.pid} on .* remove {tmp_path / FILE}"),
        locked(tmp_path),
    ):
        pass
    first.wait()
    with locked(tmp_path):
        assert (tmp_path / FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_it_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_taken_by_one_of_many(tmp_path: Path) -> None:
    first = hold(tmp_path)
    assert first_line(first) == "at work"
    first.send_signal(signal.SIGKILL)
    first.wait()
    racing = [hold(tmp_path, 3.0) for _ in range(6)]
    said = [process.communicate()[0].strip() for process in racing]
    assert sum(line == "at work" for line in said) == 1
    assert sum("is in use" in line for line in said) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "variables", "gone"),
    [
        ({}, {}, None),
        ({"age_s": 400.0}, {}, "has not touched it for 40"),
        ({"job": "12", "turn": "1"}, {"SLURM_JOB_ID": "12", "T1_TURN": "2"}, "an earlier turn of this job"),
        ({"job": "12", "turn": "1"}, {"SLURM_JOB_ID": "13", "T1_TURN": "2"}, None),
        ({"job": "12", "turn": ""}, {"SLURM_JOB_ID": "12"}, None),  # two by hand in one allocation
    ],
)
def test_owners_on_other_hosts(owner, variables, gone, tmp_path: Path) -> None:
    of_another_host(tmp_path, **owner)
    said, warned = hold(tmp_path, 0.0, **variables).communicate()
    if gone:
        assert said.strip() == "at work"
        assert gone in warned
    else:
        assert "is in use: process 7 on elsewhere" in said


def test_a_process_that_nobody_has_reaped_is_gone(tmp_path: Path) -> None:
    first = hold(tmp_path)
    assert first_line(first) == "at work"
    first.send_signal(signal.SIGKILL)
    with Path(f"/proc/{first.pid}/stat").open() as stat:
        while " Z " not in stat.read():
            stat.seek(0)
    with locked(tmp_path):
        pass
    first.wait()


def test_a_file_that_says_nothing_counts_by_its_age(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"host": "b')
    with pytest.raises(ValueError, match="in use: another process"), locked(tmp_path):
        pass
    of_another_host(tmp_path, age_s=301.0)
    with locked(tmp_path):
        pass
