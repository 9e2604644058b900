"""Stopping in order when a batch system asks: SIGUSR1 (a time limit comes near) or SIGTERM (preemption, scancel).

The rule: the step is dropped, whether it generates, asks the anchor or trains, there between two microbatches; its
finished samples stay on the disk and are not asked again; then a checkpoint is written and the process ends with
EXIT_STOPPED. A step that has begun its last microbatch is finished. Rank 0's signal decides for all ranks, at points
where all of them ask for its decision.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit code (EX_TEMPFAIL) of a run that was stopped as asked: `--resume` goes on."""
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 (not an error)
    """The run ends here as it was asked to; what is done is on the disk."""


class StopSignal:
    """Remembers that the process was asked to stop, and cuts short what may be cut."""

    def __init__(self) -> None:
        self.asked = False
        self._interruptible = False

    def install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The signal raises `Stopped` inside the block; at once when it has come already."""
        self._interruptible = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def joining(self) -> Iterator[None]:
        """The signal ends the process inside the block, by its reason and EXIT_STOPPED; `install` came before.

        While the process waits in C++ for other ranks, no handler of Python's runs: a thread of ours sees the signal.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)

        def watch() -> None:
            while received := ours.recv(1):
                if received[0] in _SIGNALS:
                    name = signal.Signals(received[0]).name
                    print(f"t1: {name} came while the ranks were joining", file=sys.stderr, flush=True)
                    os._exit(EXIT_STOPPED)
            ours.close()

        threading.Thread(target=watch, name="joining", daemon=True).start()
        before = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            theirs.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._interruptible:
            self._interruptible = False
            raise Stopped


STOP = StopSignal()
"""The process's one: signals are the process's."""
