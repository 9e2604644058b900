"""Megatron's writers of a checkpoint, made to end with the rank that they write for.

A save forks two of them, and Megatron keeps their results in a process of its own, started anew with all imports. None
of the three notices that the rank was killed: the writers write on, then wait for a reader; the keeper waits for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_PR_SET_PDEATHSIG = 1
_write = filesystem_async.FileSystemWriterAsync.write_preloaded_data


def _write_and_die_with_the_rank(*arguments: Any, **options: Any) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = multiprocessing.parent_process()
    if rank is not None and os.getppid() != rank.pid:  # it was killed before this process could ask
        os._exit(1)
    _write(*arguments, **options)


def install() -> None:
    """To be called before a save, which belongs into the main thread: the signal comes when the forking thread ends."""
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_write_and_die_with_the_rank)
    # The rank itself puts the results there and takes them out: nothing is saved asynchronously.
    filesystem_async._results_queue = queue.Queue()
