"""The processes that write a rank's part of a checkpoint, which end with the rank, and whose end the rank notices.

Megatron's own put their results into a process started anew with all imports, and nobody looks whether they live: one
that was killed would hold the run for ever, and one whose rank was killed would write on.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import multiprocessing
import os
import queue
import signal
import threading
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

_PR_SET_PDEATHSIG = 1
_CONTEXT = multiprocessing.get_context("fork")


def results_in_this_process() -> None:
    """To be called before Megatron plans a save."""
    filesystem_async._results_queue = queue.Queue()


class Writers:
    """Begun. As forks they see the numbers of this moment, whatever the rank does with its own meanwhile."""

    def __init__(self, request: AsyncRequest) -> None:
        """In the main thread: a writer is killed when the thread that forked it ends."""
        self.digests: dict[str, tuple[int, str]] = {}
        """Size and SHA-256 of every file written, by name; whole once `wait` returned."""
        self._processes: list[tuple[Any, Any]] = []
        self._buckets: list[Any] = []
        if request.async_fn is not None:  # else there is nothing to write on this rank
            transforms = request.async_fn.args[0]  # type: ignore[attr-defined]
            _, buckets, self._results = request.async_fn_args
            # Not through pinned memory: torch would keep it, and the kernel copy it into every fork.
            self._buckets = filesystem_async.FileSystemWriterAsync.preload_tensors(buckets, non_blocking=False)
            self._processes = [_start(transforms, number, bucket) for number, bucket in enumerate(self._buckets)]
        self._thread = threading.Thread(target=self._collect, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until all have ended, well or not: Megatron's `finalize_fns` tell every rank."""
        self._thread.join()

    def _collect(self) -> None:
        written, failures = {}, []
        for process, results in self._processes:  # all of them: one whose pipe is full waits for its reader
            try:
                number, found, file = results.recv()
            except (EOFError, OSError):  # before it said anything, or in the midst of it
                process.join()
                found = RuntimeError(f"a writer ended with exit code {process.exitcode}")
            except Exception as error:  # what it said can't be unpickled
                found = error
            if isinstance(found, Exception):
                failures.append(found)
            else:
                written[number] = found
                self.digests[self._buckets[number][1]] = file
        for process, _ in self._processes:
            process.join()
        if self._processes:
            self._results.put(failures[0] if failures else written)
        self._buckets.clear()


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, after it was brought to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


class _Digested(io.BufferedWriter):
    """A file whose SHA-256 is taken of what is written, one part after the other: it need not be read again."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "w"), buffer_size=1 << 20)
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return super().write(data)

    def fileno(self) -> int:
        """For Megatron's fsync, which comes before the last part has left the buffer."""
        self.flush()
        return super().fileno()

    def result(self) -> tuple[int, str]:
        return self.num_bytes, self._digest.hexdigest()


class _Results:
    """What Megatron's writer opens its file by, and puts its outcome into."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._file: _Digested | None = None

    def open(self, path: str, mode: str) -> _Digested:
        assert mode == "wb"
        self._file = _Digested(path)
        return self._file

    def put(self, outcome: tuple[int, Any]) -> None:
        number, found = outcome
        while isinstance(found, Exception) and found.__context__:  # torch's own follows from a full disk's
            found = found.__context__
        self._pipe.send((number, found, self._file.result() if self._file else None))


def _start(transforms: Any, number: int, bucket: Any) -> tuple[Any, Any]:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    unfinished = queue.Queue[int]()
    unfinished.put(number)  # what Megatron's writer ticks off, in its own memory
    process = _CONTEXT.Process(target=_write, args=(transforms, number, bucket, _Results(theirs), unfinished))
    process.start()
    theirs.close()  # in this process: the end of a writer is the end of what it says
    return process, ours


def _write(transforms: Any, number: int, bucket: Any, results: _Results, unfinished: Any) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = multiprocessing.parent_process()
    if rank is not None and os.getppid() != rank.pid:  # it was killed before this process could ask
        os._exit(1)
    filesystem_async.open = results.open  # type: ignore[attr-defined]  # in this fork alone
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, results, unfinished, use_fsync=True
    )
