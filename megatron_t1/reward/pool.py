"""Killable grader processes behind futures.

A thread a slot takes tasks from one queue, hands each to its own grader process and waits with a deadline. Past the
deadline, if it had the CPU at all, the grader's process group is SIGKILLed and the next task gets a fresh fork of the
warmed zygote (about 10 ms). A grader that dies without passing its deadline is not to blame the first times: its task
is tried again, so killing graders or the zygote at random loses no task and changes no verdict. A zygote that dies is
started again.

Whoever runs longer than `SUSPECT_AFTER_S` is a suspect: it drops to a lower CPU priority and its place goes to the
next task, so bombs run out their deadline beside the queue and not in front of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_t1.reward.worker import Channel

SUSPECT_AFTER_S = 0.1
SUSPECT_NICENESS = 5
"""A third of the others' share. Not less: an honest slow answer must come to an end on a busy machine too."""
MAX_SUSPECTS = 16
"""Bombs that may run out their deadline at the same time."""
MIN_CPU_S = 0.5
"""A task that got less CPU time than this at its deadline was starved by a busy machine, not slow, and goes on; the
slowest honest answer known needs 0.5 s. So verdicts do not depend on the load, ..."""
STARVED_FACTOR = 5
"""... up to this many deadlines."""
MAX_ATTEMPTS = 10
"""A task whose grader died this often is a `crash`."""
START_TIMEOUT_S = 60.0
"""For the zygote's imports on a busy machine."""


@dataclass
class Graded:
    """What came back for one task."""

    messages: list[Any] = field(default_factory=list)
    """The grader's messages so far; those sent before a timeout are kept."""
    ending: Literal["done", "timeout", "crash"] = "crash"
    seconds: float = 0.0
    """From the moment a grader took the task."""


class _Grader:
    """One process, reached through one socket."""

    def __init__(self, connection: socket.socket):
        self.channel = Channel(connection)
        self.pid = int(self.channel.receive(START_TIMEOUT_S))
        self.tasks = 0
        self.suspect = False

    def cpu_seconds(self) -> float:
        """CPU time of its life; 0 when it is gone. The clock is that of clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def yield_cpu(self) -> None:
        """Lower priority from now on, also where the kernel shares the CPU by sessions first (see sched(7))."""
        self.suspect = True
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, SUSPECT_NICENESS)
            Path(f"/proc/{self.pid}/autogroup").write_text(str(SUSPECT_NICENESS))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.channel.close()


class Zygote:
    """The warmed process graders are forked from; started on first use, and again when it is gone."""

    def __init__(self, memory_bytes: int, max_tasks: int):
        self._order = struct.pack("<QI", memory_bytes, max_tasks)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        environment = {
            k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH")
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_t1.reward.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        self._control = ours

    def fork(self) -> _Grader:
        """A fresh grader.

        Raises:
            RuntimeError: no grader could be started.
        """
        for _ in range(3):
            ours, theirs = socket.socketpair()
            with theirs, self._lock:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                assert self._control is not None
                try:
                    socket.send_fds(self._control, [self._order], [theirs.fileno()])
                except OSError:
                    self._start()
                    continue
            try:
                return _Grader(ours)
            except (EOFError, OSError):
                ours.close()
        raise RuntimeError(
            "the grader processes do not start: run `python -m megatron_t1.reward.worker 0` in a shell to see why"
        )

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


class Pool:
    """`submit(task)` hands a JSON object to a grader and returns a Future[Graded].

    A grader answers with JSON objects of which the last has `"done": true`.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_bytes: int, tasks_per_worker: int):
        self.num_kills = 0
        """Graders killed at their deadline."""
        self.num_lost = 0
        """Graders that died by themselves or by another hand."""
        self._zygote = Zygote(memory_bytes, tasks_per_worker)
        self._tasks_per_worker = tasks_per_worker
        self._deadline_s = deadline_s
        self._queue: queue.SimpleQueue[tuple[Any, Future[Graded]] | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(num_workers)
        self._lock = threading.Lock()
        self._idle: list[_Grader] = []
        self._live: dict[int, _Grader] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"grader-{i}", daemon=True)
            for i in range(num_workers + MAX_SUSPECTS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Any) -> Future[Graded]:
        """Queue one task.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the grader pool is closed")
        future: Future[Graded] = Future()
        self._queue.put((task, future))
        return future

    def close(self) -> None:
        """Finish what is queued, then end every process."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for grader in list(self._live.values()):
            self._drop(grader)
        self._zygote.close()

    def pids(self) -> list[int]:
        """Live processes, the zygote's first."""
        with self._lock:
            return [*self._zygote.pids(), *self._live]

    def _serve(self) -> None:
        while True:
            self._slots.acquire()
            job = self._queue.get()
            if job is None:
                self._slots.release()
                return
            task, future = job
            slot = _Slot(self._slots)
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(self._run(task, slot))
            except BaseException as error:
                future.set_exception(error)
            finally:
                slot.release()

    def _run(self, task: Any, slot: _Slot) -> Graded:
        graded = Graded()
        for _ in range(MAX_ATTEMPTS):
            grader = self._take()
            graded = Graded()
            started = time.monotonic()
            try:
                finished = self._attempt(grader, task, graded.messages, slot)
            except (EOFError, OSError, ValueError):
                self._drop(grader)
                self.num_lost += 1
                continue
            graded.seconds = time.monotonic() - started
            graded.ending = "done" if finished else "timeout"
            if finished:
                self._give(grader)
            else:
                self._drop(grader)
                self.num_kills += 1
            break
        return graded

    def _attempt(self, grader: _Grader, task: Any, messages: list[Any], slot: _Slot) -> bool:
        """Collect a grader's messages; False when its time is up.

        Raises:
            EOFError, OSError: the grader is dead.
        """
        started, cpu_before = time.monotonic(), grader.cpu_seconds()
        grader.channel.send(task, self._deadline_s)
        while True:
            waited = time.monotonic() - started
            left = self._deadline_s - waited
            if left <= 0:
                starved = grader.cpu_seconds() - cpu_before < min(MIN_CPU_S, self._deadline_s / 2)
                if not starved or waited >= STARVED_FACTOR * self._deadline_s:
                    return False
                left = SUSPECT_AFTER_S
            try:
                message = grader.channel.receive(left if grader.suspect else min(left, SUSPECT_AFTER_S))
            except TimeoutError:
                if not grader.suspect:
                    grader.yield_cpu()
                    slot.release()
                continue
            messages.append(message)
            if message["done"]:
                return True

    def _take(self) -> _Grader:
        while True:
            with self._lock:
                if not self._idle:
                    break
                grader = self._idle.pop()
            if not select.select([grader.channel], [], [], 0)[0]:
                return grader
            self._drop(grader)  # it died while idle: only the end of the connection makes it readable
        grader = self._zygote.fork()
        with self._lock:
            self._live[grader.pid] = grader
        return grader

    def _give(self, grader: _Grader) -> None:
        grader.tasks += 1
        if grader.tasks >= self._tasks_per_worker or grader.suspect:  # a priority cannot be raised again
            self._drop(grader)
            return
        with self._lock:
            self._idle.append(grader)

    def _drop(self, grader: _Grader) -> None:
        with self._lock:
            self._live.pop(grader.pid, None)
        grader.kill()


class _Slot:
    """The right to run at full priority; given back once."""

    def __init__(self, slots: threading.Semaphore):
        self._slots: threading.Semaphore | None = slots

    def release(self) -> None:
        if self._slots is not None:
            self._slots.release()
        self._slots = None
