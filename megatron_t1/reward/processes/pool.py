"""Killable grader processes behind futures.

One thread, the dispatcher, owns all of it: it hands tasks to graders, collects their messages and keeps their time, and
never blocks on any of them. Each grader holds a few tasks at once, so that it need not wait for the dispatcher. Time is
CPU time of the grader's process, so a verdict does not depend on how busy the machine is.

A grader that is late is killed, one that dies is not asked why, and the tasks it had not answered are tried again: the
first of them as a grader's only task, since it may have waited for another's reply. It is a `timeout` when it was
certainly the late one, and a `crash` only when graders died with it again and again. So killing graders or the zygote
at random loses no task and changes no verdict. What is gone is forked again from the warmed zygote (about 10 ms); a
zygote that dies is started again. A reply names its task, and is taken for no other.
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, Literal

from megatron_t1.plugins import for_graders
from megatron_t1.reward.processes.grader import Graded, Grader, Job, Zygote
from megatron_t1.reward.processes.worker import encode
from megatron_t1.warn import warn

TASKS_AHEAD = 32
"""Tasks that a grader holds at most; it gets more once it has half of that."""
MIN_STUCK_S, STUCK_FACTOR = 60.0, 30
"""A task that takes so long, and so many deadlines, without using up its CPU time is stuck (or the machine is)."""
MAX_ATTEMPTS = 30
"""A task whose grader died this often is a `crash`."""
START_TIMEOUT_S = 120.0
"""For the zygote's imports on a busy machine."""
MAX_FAILED_STARTS = 3
START_PAUSE_S = 1.0
"""Before the next try when no grader could be asked for: descriptors, processes or memory may be free by then."""
TICK_S = 0.02


class Pool:
    """`submit(task, name)` hands a JSON object to a grader and returns a Future[Graded].

    A grader answers with JSON objects of which the last has `"done": true`.
    """

    def __init__(self, module: str, num_workers: int, deadline_s: float, memory_bytes: int, tasks_per_worker: int):
        """`module`: holds `grade_task`, `prepare` and `warm_up`; `deadline_s`: CPU seconds one task may use."""
        self.num_kills = 0
        """Graders killed at their deadline."""
        self.num_lost = 0
        """Graders that died by themselves or by another hand, or were stuck."""
        self._module = module
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._stuck_s = max(MIN_STUCK_S, STUCK_FACTOR * deadline_s)
        self._tasks_per_worker = tasks_per_worker
        self._zygote = Zygote(module, memory_bytes)
        self._ids = itertools.count(1)
        self._inbox: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._graders: list[Grader] = []
        self._failed_starts = 0
        self._no_start_before = 0.0
        self._idle_s = 0.0
        """How long nothing was answered although something waits."""
        self._closed = self._asleep = False
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="graders", daemon=True)
        self._thread.start()

    def submit(self, task: dict[str, Any], name: str) -> Future[Graded]:
        """Queue one task; a warning about it says `name`.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the grader pool is closed")
        identity = next(self._ids)
        job = Job(identity, name, encode({**task, "id": identity}))
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
        return [*self._zygote.pids(), *(grader.pid for grader in list(self._graders) if grader.pid)]

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
                busy = self._waiting or any(grader.jobs for grader in self._graders)
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
            for grader in list(self._graders):
                self._drop(grader)
            self._waiting.extend(self._inbox)
            self._fail(RuntimeError("the grader pool has ended"))
            self._zygote.close()
            self._selector.close()
            self._alarm.close()

    def _assign(self) -> None:
        """Waiting jobs to the graders, spread evenly; used-up graders are replaced, missing ones forked."""
        for grader in list(self._graders):
            if not grader.jobs and grader.num_tasks >= self._tasks_per_worker:
                self._drop(grader)
        ready = [grader for grader in self._graders if grader.pid and len(grader.jobs) <= TASKS_AHEAD // 2]
        given: set[Grader] = set()
        for depth in range(TASKS_AHEAD):
            for grader in ready:
                if len(grader.jobs) == depth and (job := self._next_job(grader)):
                    grader.give(job)
                    given.add(grader)
        for grader in given:
            self._send(grader)
        while len(self._graders) < min(self._num_workers, len(self._graders) + len(self._waiting)):
            if time.monotonic() < self._no_start_before:
                return
            try:
                grader = self._zygote.fork()
            except OSError as error:
                self._no_start_before = time.monotonic() + START_PAUSE_S
                warn(f"grading: no grader can be started at present: {error}")
                if not self._graders:  # else they do the work
                    self._count_failed_start(f" ({error})")
                return
            self._selector.register(grader.connection, selectors.EVENT_READ, grader)
            self._graders.append(grader)

    def _next_job(self, grader: Grader) -> Job | None:
        """What this grader may take now: a job that must be alone only when it has none, and none beside such a job."""
        if grader.num_tasks >= self._tasks_per_worker or (grader.jobs and grader.jobs[0].alone):
            return None
        while self._waiting and not (self._waiting[0].alone and grader.jobs):
            job = self._waiting.popleft()
            if job.begin():
                return job
        return None

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
            if not grader.pid and isinstance(message, int):
                grader.pid = message
                self._failed_starts = 0
            elif isinstance(message, dict) and grader.jobs and message.get("id") == grader.jobs[0].id:
                grader.jobs[0].messages.append(message)
                if message.get("done"):
                    self._finish(grader, "done")
            else:
                self._lose(grader)
                return

    def _finish(self, grader: Grader, ending: Literal["done", "timeout", "crash"]) -> None:
        job = grader.jobs.popleft()
        seconds = time.monotonic() - grader.started
        grader.begin()
        self._idle_s = 0.0
        job.future.set_result(Graded(job.messages, ending, seconds))

    def _keep_time(self, elapsed_s: float) -> None:
        for grader in list(self._graders):
            if grader.pid and not grader.jobs:
                continue
            grader.busy_s += elapsed_s
            if not grader.pid:
                if grader.busy_s > START_TIMEOUT_S:
                    self._lose(grader)
            elif grader.used_cpu_s() >= self._deadline_s or grader.busy_s > self._stuck_s:
                job = grader.jobs[0]
                self._receive(grader)  # it may have answered in this moment
                if grader in self._graders and grader.jobs and grader.jobs[0] is job:
                    self._end_late(grader)
        self._idle_s = self._idle_s + elapsed_s if self._waiting else 0.0
        if self._idle_s > 2 * self._stuck_s:
            self._idle_s = 0.0
            warn(
                f"grading: nothing was answered for {2 * self._stuck_s:.0f} s; {len(self._waiting)} answers wait, "
                f"{self._waiting[0].name} first; {len(self.pids())} processes"
            )

    def _end_late(self, grader: Grader) -> None:
        job, used_s = grader.jobs[0], grader.used_cpu_s()
        if used_s < self._deadline_s:
            if grader.busy_s > self._stuck_s:  # else it died since its time was read
                warn(
                    f"grading: {job.name} is stuck for {grader.busy_s:.0f} s in process {grader.pid}, which used "
                    f"{used_s:.2f} CPU seconds; it is tried again by another (attempt {job.attempts} of {MAX_ATTEMPTS})"
                )
            self._lose(grader)
            return
        self.num_kills += 1
        if job.alone or job.messages:  # no reply to another task can be held back
            self._finish(grader, "timeout")
        job.alone = True
        self._drop(grader)

    def _lose(self, grader: Grader) -> None:
        """It died, is stuck, or never came up: its jobs go to others."""
        if grader.pid:
            self.num_lost += 1
        if grader.jobs:
            grader.jobs[0].alone = True
            if grader.jobs[0].attempts >= MAX_ATTEMPTS:
                self._finish(grader, "crash")
        self._drop(grader)
        if not grader.pid:
            self._count_failed_start()

    def _count_failed_start(self, cause: str = "") -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS * self._num_workers:
            self._failed_starts = 0
            command = " ".join(["python -m megatron_t1.reward.processes.worker 0", self._module, *for_graders()])
            self._fail(RuntimeError(f"graders do not start{cause}: `{command}` may show why"))

    def _fail(self, error: Exception) -> None:
        for job in self._waiting:
            if job.begin():
                job.future.set_exception(error)
        self._waiting.clear()

    def _drop(self, grader: Grader) -> None:
        """End a grader; what it still held is waiting again."""
        self._graders.remove(grader)
        self._selector.unregister(grader.connection)
        grader.kill()
        for job in reversed(grader.jobs):
            job.messages = []
            self._waiting.appendleft(job)
