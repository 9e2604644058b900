"""Runs one command as a process group that cannot outlive its starter: `python -m ... <starter's pid> command ...`.

vLLM's API server leaves its engine processes behind when it is killed, and everything behind when the trainer is. This
process is the group's leader; it watches both and kills the group when either is gone. Polling the parent's id, not
PR_SET_PDEATHSIG alone: that signal fires when the starting *thread* ends, and reaches the direct child only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
ENDED_BY_ITSELF = "supervisor: the server ended by itself, exit code"
"""Begins the last line of the log of a server that was not killed; a killed supervisor can't write one."""


def _die_with_supervisor() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    starter_pid, command = int(sys.argv[1]), sys.argv[2:]
    # The group gets SIGTERM to end in order, and this process stays to see it done. SIG_IGN would be inherited.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # preexec_fn is safe here: this process has one thread.
    child = subprocess.Popen(command, preexec_fn=_die_with_supervisor)
    while child.poll() is None and os.getppid() == starter_pid:
        time.sleep(0.1)
    code = child.poll()
    if code is None:
        print("supervisor: who started the server is gone, it is ended", flush=True)
    elif code < 0:
        print(f"supervisor: the server was killed by signal {-code}", flush=True)
    else:
        print(f"{ENDED_BY_ITSELF} {code}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
