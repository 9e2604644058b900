"""What a job tells must not end its work: terminals are closed, pipes end, `2>&-` leaves no stderr at all."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class _Patient:
    """A text stream that goes on to nowhere when its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # for what writes past us too, and for what is still to be flushed
        os.close(nowhere)


def outlive_the_terminal() -> None:
    """Call it before any file is opened: one opened without a stderr would become the stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), _Patient):
            setattr(sys, name, _Patient(stream))
