"""Where the time of a run goes, event by event: a file for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

    tracks: steps | trainer (pack, anchor, train, checkpoint, ...) | push (by phase) | grading | each server

Events are appended as they end, one a line; the format needs no closing bracket, so a killed run's file opens too, and
a resumed one goes on in it. Times are the wall clock's.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_t1.warn import warn

_SHORTEST_S = 0.01
"""Of a busy span that is written: samples that are graded one by one as they come would be most of the file."""


class Trace:
    """Of one process; from any thread. Times are given by `time.monotonic()`."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: None writes nothing; a file of an earlier process is gone on with."""
        self._path = path
        self._lock = threading.Lock()
        self._to_wall_clock = time.time() - time.monotonic()
        self._named: set[str] = set()
        self._under_way: dict[str, int] = defaultdict(int)
        self._since: dict[str, float] = {}
        self._counted_to: dict[str, float] = {}
        self._busy_s: dict[str, float] = defaultdict(float)

    def span(self, track: str, name: str, began: float, ended: float) -> None:
        if self._path is None:
            return
        microseconds = {"ts": (began + self._to_wall_clock) * 1e6, "dur": (ended - began) * 1e6}
        with self._lock:
            events = []
            where = {
                "pid": 1,
                "tid": zlib.crc32(track.encode()) >> 1,
            }  # the same in every process that goes on in a file
            if track not in self._named:
                self._named.add(track)
                events.append({"name": "thread_name", "ph": "M", "args": {"name": track}, **where})
            events.append({"name": name, "ph": "X", **microseconds, **where})
            try:
                self._append(self._path, events)
            except OSError as error:
                warn(f"{self._path} can't be written and ends here: {error}")
                self._path = None

    @staticmethod
    def _append(path: Path, events: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write("[\n")
            file.writelines(json.dumps(event) + ",\n" for event in events)

    @contextmanager
    def busy(self, track: str, name: str, count: int = 1) -> Iterator[None]:
        """`count` things are under way on a track; all that overlaps is one span, from the first to the last."""
        with self._lock:
            if self._under_way[track] == 0:
                self._since[track] = self._counted_to[track] = time.monotonic()
            self._under_way[track] += count
        try:
            yield
        finally:
            ended = time.monotonic()
            with self._lock:
                self._under_way[track] -= count
                idle_again = self._under_way[track] == 0
                if idle_again:
                    self._busy_s[track] += ended - self._counted_to[track]
            if idle_again and ended - self._since[track] >= _SHORTEST_S:
                self.span(track, name, self._since[track], ended)

    def take_busy_s(self) -> dict[str, float]:
        """Seconds that each track was busy since the last call."""
        now = time.monotonic()
        with self._lock:
            for track, count in self._under_way.items():
                if count:
                    self._busy_s[track] += now - self._counted_to[track]
                    self._counted_to[track] = now
            taken, self._busy_s = dict(self._busy_s), defaultdict(float)
        return taken
