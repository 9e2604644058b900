"""Killable grader processes behind futures.

One thread, the dispatcher, owns all of it: it hands tasks to graders, collects their messages and keeps their time, and
never blocks on any of them. Time is CPU time of the grader's process, so a verdict does not depend on how busy the
machine is. There are two lanes:

- The fast lane is `num_workers` graders. Each holds a few tasks at once, so that it need not wait for the dispatcher.
- The slow lane is for what may use up its deadline. A grader says so of a task before the one thing that has no limit
  of its own (`NEEDS_PATIENCE`), and the task waits for a grader of the slow lane. A task that has used `SUSPECT_CPU_S`
  otherwise moves there with its grader, and a fresh one takes its place. The slow lane runs when nothing else waits, or
  one task at a time once something in it has waited `MAX_WAIT_S`, and is stopped (SIGSTOP) otherwise, so bombs cost the
  others nothing. When a task's deadline is used up, its grader's process group is SIGKILLed.

A grader that dies otherwise is not to blame the first times: its tasks are tried again, so killing graders or the
zygote at random loses no task and changes no verdict. What is gone is forked again from the warmed zygote (about
10 ms); a zygote that dies is started again.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, Literal

from megatron_t1.reward.processes.grader import Graded, Grader, Job, Zygote
from megatron_t1.reward.processes.worker import encode

TASKS_AHEAD = 32
"""Tasks that a grader of the fast lane holds at most; it gets more once it has half of that."""
SUSPECT_CPU_S = 0.05
"""The slowest honest answer known needs 0.015 s."""
MAX_WAIT_S = 5.0
QUIET_S = 0.2
"""So long nothing may have waited before the slow lane runs: who submits may just be slower than the graders."""
MAX_SUSPECTS = 64
"""More leave no room for the fast lane: each is a process of its own."""
MIN_STALL_S, STALL_FACTOR = 60.0, 30
"""A grader that takes so much time, and so many deadlines, without using its CPU time is stuck (or the machine is)."""
MAX_ATTEMPTS = 30
"""A task whose grader died this often is a `crash`."""
START_TIMEOUT_S = 120.0
"""For the zygote's imports on a busy machine."""
MAX_FAILED_STARTS = 3
TICK_S = 0.02


class Pool:
    """`submit(task)` hands a JSON object to a grader and returns a Future[Graded].

    A grader answers with JSON objects of which the last has `"done": true`.
    """

    def __init__(self, num_workers: int, deadline_s: float, memory_bytes: int, tasks_per_worker: int):
        """`deadline_s`: CPU seconds one task may use."""
        self.num_kills = 0
        """Graders killed at their deadline."""
        self.num_lost = 0
        """Graders that died by themselves or by another hand."""
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._tasks_per_worker = tasks_per_worker
        self._zygote = Zygote(memory_bytes)
        self._inbox: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._fast: list[Grader] = []
        self._slow: list[Grader] = []
        self._patient: deque[Job] = deque()
        """For the slow lane."""
        self._busy_at = 0.0
        """When the fast lane had work last."""
        self._slow_running = 0
        """Graders of the slow lane that may run now."""
        self._failed_starts = 0
        self._closed = self._asleep = False
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="graders", daemon=True)
        self._thread.start()

    def submit(self, task: Any) -> Future[Graded]:
        """Queue one task.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the grader pool is closed")
        job = Job(encode(task), Future())
        self._inbox.append(job)
        self._wake()
        return job.future

    def close(self) -> None:
        """Finish what is queued, then end every process."""
        self._closed = True
        self._wake(always=True)
        self._thread.join()
        self._bell.close()

    def pids(self) -> list[int]:
        """Live processes, the zygote's first."""
        return [*self._zygote.pids(), *(g.pid for g in [*self._fast, *self._slow] if g.pid)]

    def _wake(self, always: bool = False) -> None:
        if self._asleep or always:
            self._asleep = False
            with contextlib.suppress(OSError):
                self._bell.send(b"!")

    # --- the dispatcher's thread -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        checked = 0.0
        try:
            while True:
                busy = self._waiting or self._slow or self._patient or any(g.jobs for g in self._fast)
                if self._closed and not busy and not self._inbox:
                    return
                self._asleep = True  # from here on, who submits rings
                timeout = 0 if self._inbox else TICK_S if busy else None
                events = self._selector.select(timeout)
                self._asleep = False
                for key, mask in events:
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self._alarm.recv(4096)
                    elif mask & selectors.EVENT_WRITE:
                        self._send(key.data)
                    else:
                        self._receive(key.data)
                while self._inbox:
                    self._waiting.append(self._inbox.popleft())
                now = time.monotonic()
                if now - checked >= TICK_S:
                    self._keep_time(min(now - checked, 10 * TICK_S))
                    checked = now
                self._assign()
        finally:
            self._closed = True
            for grader in [*self._fast, *self._slow]:
                self._drop(grader)
            self._fail(RuntimeError("the grader pool has ended"))
            self._zygote.close()
            self._selector.close()
            self._alarm.close()

    def _assign(self) -> None:
        """Waiting jobs to the fast lane, spread evenly; graders are forked for what they cannot take."""
        ready = [g for g in self._fast if g.pid and len(g.jobs) <= TASKS_AHEAD // 2]
        given: set[Grader] = set()
        for depth in range(TASKS_AHEAD):
            for grader in ready:
                if len(grader.jobs) == depth and grader.num_tasks < self._tasks_per_worker and self._next_job(grader):
                    given.add(grader)
        for grader in given:
            self._send(grader)
        wanted = min(self._num_workers, len(self._fast) + len(self._waiting), MAX_SUSPECTS - len(self._slow))
        while len(self._fast) < wanted:
            self._fast.append(self._fork())
        while self._patient and len(self._slow) < self._slow_running:
            grader = self._fork()
            grader.slow = True
            self._slow.append(grader)
            self._next_job(grader)
            self._send(grader)

    def _fork(self) -> Grader:
        grader = self._zygote.fork()
        self._selector.register(grader.connection, selectors.EVENT_READ, grader)
        return grader

    def _next_job(self, grader: Grader) -> bool:
        queue = self._patient if grader.slow else self._waiting
        while queue:
            job = queue.popleft()
            if job.begin():
                grader.jobs.append(job)
                grader.num_tasks += 1
                grader.unsent += job.frame
                if len(grader.jobs) == 1:
                    grader.begin()
                return True
        return False

    def _send(self, grader: Grader) -> None:
        try:
            sent = grader.connection.send(grader.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose(grader)
            return
        del grader.unsent[:sent]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if grader.unsent else 0)
        if self._selector.get_key(grader.connection).events != wanted:
            self._selector.modify(grader.connection, wanted, grader)

    def _receive(self, grader: Grader) -> None:
        try:
            messages = grader.frames.feed(grader.connection.recv(1 << 16))
        except BlockingIOError:
            return
        except (OSError, EOFError, ValueError):
            self._lose(grader)
            return
        for message in messages:
            if not grader.pid:
                grader.pid = int(message)
                self._failed_starts = 0
                continue
            if not grader.jobs or not isinstance(message, dict) or "done" not in message:
                self._lose(grader)
                return
            if message.get("needs_patience"):
                if grader.slow:  # it was asked to be patient
                    self._lose(grader)
                    return
                job = grader.jobs.popleft()
                grader.begin()
                job.make_patient()
                self._patient.append(job)
                continue
            grader.jobs[0].messages.append(message)
            if message["done"]:
                self._finish(grader, "done")
                if grader.slow and self._next_job(grader):
                    self._send(grader)
                elif grader.slow or (grader.num_tasks >= self._tasks_per_worker and not grader.jobs):
                    self._drop(grader)
                    return

    def _finish(self, grader: Grader, ending: Literal["done", "timeout"]) -> None:
        job = grader.jobs.popleft()
        seconds = time.monotonic() - grader.started
        grader.begin()
        job.future.set_result(Graded(job.messages, ending, seconds))

    def _keep_time(self, elapsed_s: float) -> None:
        for grader in [*self._fast, *self._slow]:
            if grader.stopped or not (grader.jobs or not grader.pid):
                continue
            grader.stalled_s += elapsed_s
            used = grader.used_cpu_s()
            if not grader.pid:
                if grader.stalled_s > START_TIMEOUT_S:
                    self._lose(grader)
            elif used >= self._deadline_s or grader.stalled_s > max(MIN_STALL_S, STALL_FACTOR * self._deadline_s):
                self.num_kills += 1
                self._finish(grader, "timeout")
                self._drop(grader)
            elif used >= min(SUSPECT_CPU_S, self._deadline_s / 2) and not grader.slow:
                grader.slow = True
                self._fast.remove(grader)
                self._slow.append(grader)
                job = grader.jobs.popleft()
                self._retry(grader.jobs)  # those behind it: the grader is dropped before it comes to them
                grader.jobs.append(job)
        now = time.monotonic()
        if self._waiting or any(g.jobs for g in self._fast):
            self._busy_at = now
        self._slow_running = self._num_workers
        if now - self._busy_at < QUIET_S:
            since = [g.started for g in self._slow] + [job.patient_since or 0.0 for job in self._patient]
            self._slow_running = int(any(now - each > MAX_WAIT_S for each in since))
        self._slow.sort(key=Grader.used_cpu_s)  # so that what ends soon does not wait for bombs
        for i, grader in enumerate(self._slow):
            grader.stop(i >= self._slow_running)

    def _retry(self, jobs: deque[Job]) -> None:
        while jobs:
            job = jobs.pop()
            job.messages = []
            (self._patient if job.patient_since else self._waiting).appendleft(job)

    def _lose(self, grader: Grader) -> None:
        """It died, or never came up: its jobs go to others."""
        if grader.pid:
            self.num_lost += 1
        else:
            self._failed_starts += 1
        if grader.jobs and grader.jobs[0].attempts >= MAX_ATTEMPTS:
            job = grader.jobs.popleft()
            job.future.set_result(Graded(job.messages, "crash", time.monotonic() - grader.started))
        self._drop(grader)
        if self._failed_starts >= MAX_FAILED_STARTS * self._num_workers:
            self._failed_starts = 0
            self._fail(
                RuntimeError("graders do not start: `python -m megatron_t1.reward.processes.worker 0` may show why")
            )

    def _fail(self, error: Exception) -> None:
        for job in (*self._waiting, *self._patient):
            if job.begin():
                job.future.set_exception(error)
        self._waiting.clear()
        self._patient.clear()

    def _drop(self, grader: Grader) -> None:
        """End a grader; what it still held is waiting again."""
        (self._slow if grader.slow else self._fast).remove(grader)
        self._selector.unregister(grader.connection)
        grader.kill()
        self._retry(grader.jobs)
