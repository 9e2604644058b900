"""Gives a reader damaged inputs, each within a time and a memory, and judges what comes of them."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader, ToldError

_SECONDS, _BYTES = 20, 2 << 30
_OURS = str(Path(__file__).parents[2] / "megatron_t1")


class TooSlow(BaseException):
    """Past every handler."""


@dataclass
class Tally:
    name: str
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    leaks: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def line(self) -> str:
        text = f"{self.name}: {self.accepted.total()} accepted, {self.refused.total()} refused, "
        text += f"{self.leaks.total()} leaked in {len(self.leaks)} kinds"
        for kind, count in self.leaks.most_common():
            data, told = self.examples[kind]
            text += f"\n  {count} x {kind}\n      {told[:300]!r}\n      of {data[:300]!r}"
        return text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A memory for what stands inside, beyond what the process has; `clock` is set for each input."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + _BYTES, hard))
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_slow(*_: object) -> None:
    raise TooSlow


def fuzz(reader: Reader, count: int, seed: int, *, show: bool = False) -> Tally:
    """`count` damaged inputs, the same for the same seed."""
    tally = Tally(reader.name)
    rng = random.Random(f"{seed}/{reader.name}")
    with bounded():
        for data in reader.seeds:
            reader.check(reader.read(data))
        for _ in range(count):
            data, how = reader.damaged(rng)
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)
            try:
                result = reader.read(data)
                reader.check(result)
            except BaseException as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                if kind := _leak(reader, error):
                    tally.leaks[kind] += 1
                    tally.examples.setdefault(kind, (data, str(error)))
                else:
                    tally.refused[how] += 1
            else:
                signal.setitimer(signal.ITIMER_REAL, 0)
                tally.accepted[how] += 1
                if show and tally.accepted[how] <= 6:
                    print(f"  {reader.name}, {how}: {data[:400]!r}\n    -> {_short(result)}")
    return tally


def _leak(reader: Reader, error: BaseException) -> str | None:
    """What is wrong with an error; None when it is one that the reader documents."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    where = f"{Path(ours[-1].filename).relative_to(_OURS)}:{ours[-1].lineno}" if ours else "?"
    name = type(error).__name__
    if isinstance(error, ToldError):
        return None
    if not isinstance(error, reader.errors) or not ours:
        return f"{name} at {where} (raised at {frames[-1].filename}:{frames[-1].lineno})"
    if frames[-1] is not ours[-1]:
        return f"{name} of {frames[-1].filename}:{frames[-1].lineno} comes through {where}"
    if type(error) is not ValueError and not type(error).__module__.startswith("megatron_t1"):
        return f"{name} at {where}"
    if not re.search(reader.says, str(error)):
        return f"{name} at {where} does not say {reader.says!r}"
    if len(str(error)) > 20_000:
        return f"{name} at {where} says {len(str(error))} letters"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text[:400]
