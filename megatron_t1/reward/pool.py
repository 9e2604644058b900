"""Killable grader processes behind futures.

A thread a slot takes tasks from one queue, hands each to its own grader process and waits with a deadline. Past the
deadline the grader's process group is SIGKILLed and the next task gets a fresh fork of the warmed zygote (about 11 ms).
A grader that dies without passing its deadline is not to blame the first times: its task is tried again, so killing
graders or the zygote at random loses no task and changes no verdict. A zygote that dies is started again.

Whoever runs longer than `SUSPECT_AFTER_S` is a suspect: it drops to the lowest CPU priority and its place goes to the
next task, so bombs run out their deadline beside the queue and not in front of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

from megatron_t1.reward.worker import receive_frame, send_frame

SUSPECT_AFTER_S = 0.15
MAX_SUSPECTS = 16
"""Bombs that may run out their deadline at the same time."""
MAX_ATTEMPTS = 4
"""A task whose grader died this often is a `crash`."""
START_TIMEOUT_S = 60.0
"""For the zygote's imports on a busy machine."""


class Lost(RuntimeError):
    """The grader of a task died before its deadline."""


class _Grader:
    """One process, reached through one socket."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        connection.settimeout(START_TIMEOUT_S)
        self.pid = int(receive_frame(connection))
        self.tasks = 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.connection.close()


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

    def close(self) -> None:
        """End the zygote, and with it every grader."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


class Pool:
    """`submit(task)` -> Future of the list of messages its grader sent, with how it ended as the last element.

    A task is a JSON object; a grader answers with messages of which the last has `"done": true`. The result is
    (messages, ending) with ending "done", "timeout" or "crash"; messages that came before a timeout are kept.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_bytes: int, tasks_per_worker: int):
        self._zygote = Zygote(memory_bytes, tasks_per_worker)
        self._tasks_per_worker = tasks_per_worker
        self._deadline_s = deadline_s
        self._queue: queue.SimpleQueue[tuple[Any, Future[Any]] | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(num_workers)
        self._num_threads = num_workers + MAX_SUSPECTS
        self._graders: dict[int, _Grader] = {}
        self._closed = False
        self.num_kills = 0
        self.num_lost = 0
        self._threads = [
            threading.Thread(target=self._serve, name=f"grader-{i}", daemon=True) for i in range(self._num_threads)
        ]
        self._idle: list[_Grader] = []
        self._idle_lock = threading.Lock()
        for thread in self._threads:
            thread.start()

    def submit(self, task: Any) -> Future[tuple[list[Any], str]]:
        """Queue one task."""
        if self._closed:
            raise RuntimeError("the grader pool is closed")
        future: Future[tuple[list[Any], str]] = Future()
        self._queue.put((task, future))
        return future

    def close(self) -> None:
        """Finish what is queued, then end every process."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for grader in self._idle:
            grader.kill()
        self._zygote.close()

    def pids(self) -> list[int]:
        """Live graders, for tests and monitoring."""
        return list(self._graders)

    def _serve(self) -> None:
        while True:
            self._slots.acquire()
            job = self._queue.get()
            if job is None:
                self._slots.release()
                return
            task, future = job
            if not future.set_running_or_notify_cancel():
                self._slots.release()
                continue
            holds_slot = [True]
            try:
                future.set_result(self._run(task, holds_slot))
            except BaseException as error:
                future.set_exception(error)
            finally:
                if holds_slot[0]:
                    self._slots.release()

    def _run(self, task: Any, holds_slot: list[bool]) -> tuple[list[Any], str]:
        messages: list[Any] = []
        for _ in range(MAX_ATTEMPTS):
            grader = self._take()
            messages = []
            try:
                ending = self._attempt(grader, task, messages, holds_slot)
            except (EOFError, OSError, ValueError):
                self._drop(grader)
                self.num_lost += 1
                continue
            if ending == "timeout":
                self._drop(grader)
                self.num_kills += 1
            else:
                self._give(grader)
            return messages, ending
        return messages, "crash"

    def _attempt(self, grader: _Grader, task: Any, messages: list[Any], holds_slot: list[bool]) -> str:
        started = time.monotonic()
        grader.connection.settimeout(self._deadline_s)
        send_frame(grader.connection, task)
        suspect = False
        while True:
            left = self._deadline_s - (time.monotonic() - started)
            if left <= 0:
                return "timeout"
            grader.connection.settimeout(left if suspect else min(left, SUSPECT_AFTER_S))
            try:
                message = receive_frame(grader.connection)
            except TimeoutError:
                if not suspect:
                    suspect = True
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, grader.pid, 19)
                    if holds_slot[0]:
                        holds_slot[0] = False
                        self._slots.release()
                continue
            messages.append(message)
            if message.get("done"):
                if suspect:
                    grader.tasks = self._tasks_per_worker  # its priority cannot be raised again
                return "done"

    def _take(self) -> _Grader:
        with self._idle_lock:
            if self._idle:
                return self._idle.pop()
        grader = self._zygote.fork()
        self._graders[grader.pid] = grader
        return grader

    def _give(self, grader: _Grader) -> None:
        grader.tasks += 1
        if grader.tasks >= self._tasks_per_worker:
            self._drop(grader)
            return
        with self._idle_lock:
            self._idle.append(grader)

    def _drop(self, grader: _Grader) -> None:
        self._graders.pop(grader.pid, None)
        grader.kill()
