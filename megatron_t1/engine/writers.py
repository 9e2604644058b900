"""The processes that write a rank's part of a checkpoint, which end with the rank, and whose end the rank notices.

Megatron's own put their results into a process started anew with all imports, and nobody looks whether they live: one
that was killed would hold the run for ever, and one whose rank was killed would write on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import multiprocessing
import multiprocessing.connection
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
            assert request.preload_fn is not None
            transforms, self._results = request.async_fn.args[0], request.async_fn_args[2]  # type: ignore[attr-defined]
            self._buckets = request.preload_fn()
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
        written: dict[int, Any] = {}
        try:
            for process, results in self._processes:
                multiprocessing.connection.wait([results._reader, process.sentinel])
                if results.empty():
                    process.join()
                    raise RuntimeError(f"a writer ended with exit code {process.exitcode}")
                number, found = results.get()
                if isinstance(found, Exception):
                    raise found
                written[number] = found
            for path, name, _ in self._buckets:
                self.digests[name] = digest(Path(path))
        except Exception as error:
            self._results.put(error)
        else:
            if self._processes:
                self._results.put(written)
        finally:
            for process, _ in self._processes:
                with contextlib.suppress(ValueError):
                    process.join()
            self._buckets.clear()


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, after it was brought to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _start(transforms: Any, number: int, bucket: Any) -> tuple[Any, Any]:
    results, unfinished = _CONTEXT.SimpleQueue(), queue.Queue[int]()
    unfinished.put(number)  # what Megatron's writer ticks off, in its own memory
    process = _CONTEXT.Process(
        target=_write, args=(transforms, number, bucket, results, unfinished), kwargs={"use_fsync": True}
    )
    process.start()
    return process, results


def _write(*arguments: Any, **options: Any) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = multiprocessing.parent_process()
    if rank is not None and os.getppid() != rank.pid:  # it was killed before this process could ask
        os._exit(1)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(*arguments, **options)
