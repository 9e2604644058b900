"""A command goes on when nobody reads what it tells."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.forks import ROOT, environment

TELLS = """
    import os, sys, time
    from pathlib import Path
    from megatron_t1.cli.streams import outlive_the_terminal
    outlive_the_terminal()
    from megatron_t1.warn import warn
    kept = open(sys.argv[1], "w")
    print("begins", flush=True)
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    warn("told")
    print("told", flush=True)
    os.write(2, b"by a library")
    kept.write("done")
"""


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(TELLS), *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, **options)


@pytest.mark.parametrize("closed", [[2], [1], [0, 1, 2]])
def test_closed_streams_end_nothing(tmp_path: Path, closed: list[int]) -> None:
    ends = start(tmp_path / "kept", preexec_fn=lambda: [os.close(number) for number in closed])
    assert ends.wait(60) == 0
    assert (tmp_path / "kept").read_text() == "done"


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    ends = start(tmp_path / "kept", tmp_path / "go", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    assert b"begins" in os.read(ours, 100)
    os.close(ours)
    (tmp_path / "go").touch()
    assert ends.wait(60) == 0
    assert (tmp_path / "kept").read_text() == "done"


def test_a_reader_that_had_enough_ends_nothing(tmp_path: Path) -> None:
    ends = start(tmp_path / "kept", tmp_path / "go", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert ends.stdout
    ends.stdout.readline()
    ends.stdout.close()
    (tmp_path / "go").touch()
    assert ends.wait(60) == 0
    assert (tmp_path / "kept").read_text() == "done"
