"""A signal while ranks join ends the process within seconds and says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_t1.stop import EXIT_STOPPED
from tests.forks import ROOT, environment

# As one that waits in C++ for the other ranks: its main thread runs no Python, so no handler of Python's.
WAITS = """
    import ctypes, signal
    from megatron_t1.stop import STOP
    STOP.install()
    with STOP.joining():
        pass
    with STOP.joining():
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        print("waits", flush=True)
        libc = ctypes.CDLL(None)
        while True:
            libc.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_ranks_join_ends_the_process_with_its_reason(number: signal.Signals) -> None:
    waits = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WAITS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert waits.stdout
    assert waits.stdout.readline() == "waits\n"
    waits.send_signal(number)
    _, told = waits.communicate(timeout=60)
    assert waits.returncode == EXIT_STOPPED
    assert told == f"t1: {number.name} came while the ranks were joining\n"
