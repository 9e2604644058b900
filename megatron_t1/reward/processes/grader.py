"""The owner's side of the grader processes: a warmed zygote to fork them from, and what is known of each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_t1.plugins import for_graders
from megatron_t1.reward.processes.worker import Frames


@dataclass
class Graded:
    """What came back for one task."""

    messages: list[Any] = field(default_factory=list)
    """The grader's messages so far; those sent before a timeout are kept."""
    ending: Literal["done", "timeout", "crash"] = "crash"
    seconds: float = 0.0
    """From the moment a grader took the task."""


@dataclass
class Job:
    """One task, until it is answered."""

    id: int
    name: str
    """For people: whose answer it is."""
    frame: bytes
    future: Future[Graded] = field(default_factory=Future)
    attempts: int = 0
    alone: bool = False
    """A grader was late or died with it: whether by its fault shows when it is a grader's only task."""
    messages: list[Any] = field(default_factory=list)

    def begin(self) -> bool:
        """False when nobody waits for it any more."""
        return self.future.running() or self.future.set_running_or_notify_cancel()


class Grader:
    """One process, reached through one socket. `pid` is 0 until it has said hello."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.connection = connection
        self.frames = Frames()
        self.unsent = bytearray()
        self.jobs: deque[Job] = deque()
        self.pid = 0
        self.num_tasks = 0
        self.begin()

    def begin(self) -> None:
        """The first of its jobs begins, or it waits for one."""
        self.started = time.monotonic()
        self.busy_s = 0.0
        self._cpu_before = self._cpu_s()
        if self.jobs:
            self.jobs[0].attempts += 1

    def give(self, job: Job) -> None:
        """One more task, sent when its socket takes it."""
        self.jobs.append(job)
        self.num_tasks += 1
        self.unsent += job.frame
        if len(self.jobs) == 1:
            self.begin()

    def used_cpu_s(self) -> float:
        """CPU time of the current job."""
        return self._cpu_s() - self._cpu_before

    def _cpu_s(self) -> float:
        """CPU time of its life; 0 when it is gone. The clock is that of clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2) if self.pid else 0.0
        except OSError:
            return 0.0

    def kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.connection.close()


_PASSED_ON = {
    *("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE"),
    "LD_LIBRARY_PATH",  # of a Python that an environment module brings
}
_HOME = Path(__file__).resolve().parents[3]
"""The folder that this package lies in."""


class Zygote:
    """The warmed process graders are forked from; started on first use, and again when it is gone."""

    def __init__(self, module: str, memory_bytes: int):
        """`module` holds the graders' `grade_task`, `prepare` and `warm_up`."""
        self._module = module
        self._order = struct.pack("<Q", memory_bytes)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        if _HOME.name not in ("site-packages", "dist-packages"):  # a checkout that is found as the working directory
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_HOME), environment.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_t1.reward.processes.worker", str(theirs.fileno()), self._module,
                 *for_graders()],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._control = ours

    def fork(self) -> Grader:
        """A grader that will say hello; its connection closes when it cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            if self._process is None or self._process.poll() is not None or not self._pass_on(theirs):
                self._start()  # the process of one that was just killed may still be there, and its socket gone
                self._pass_on(theirs)
        return Grader(ours)

    def _pass_on(self, connection: socket.socket) -> bool:
        """Hand a new grader's end of its connection over; False when nobody takes it."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [self._order], [connection.fileno()])
        except OSError:
            return False
        return True

    def pids(self) -> list[int]:
        """The zygote's process id, when it runs."""
        return [self._process.pid] if self._process is not None else []

    def close(self) -> None:
        """End the zygote, and with it every grader."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None
