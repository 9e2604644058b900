"""What a reader under fuzz is, and what its checks share."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.damage import spoil, spoil_bytes, text_of


class ToldError(Exception):
    """Raised by a check: the reader says in its result, not by an error, that the input is damaged."""


Damage = Callable[[random.Random], tuple[bytes, str]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One reader, ready to be asked."""

    name: str
    damaged: Damage
    """A damaged input and how it was damaged."""
    read: Callable[[bytes], Any]
    check: Callable[[Any], None]
    """Raises AssertionError for a result that is not what the reader promises."""
    errors: tuple[type[Exception], ...] = (ValueError,)
    says: str = ""
    """A pattern that an error's message must match: the file, with its line where it has lines."""
    seeds: Sequence[bytes] = ()
    """Undamaged inputs, which must be accepted."""


def json_damage(*seeds: Any) -> Damage:
    def damaged(rng: random.Random) -> tuple[bytes, str]:
        seed = rng.choice(seeds)
        if rng.random() < 0.35:
            return spoil_bytes(json.dumps(seed, ensure_ascii=False).encode(), rng)
        value, what = spoil(seed, rng)
        return text_of(value, rng), what

    return damaged


def jsonl_damage(rows: Sequence[dict[str, Any]]) -> Damage:
    def damaged(rng: random.Random) -> tuple[bytes, str]:
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        if rng.random() < 0.35:
            return spoil_bytes(b"\n".join(lines) + b"\n", rng)
        number = rng.randrange(len(rows))
        value, what = spoil(rows[number], rng)
        lines[number] = text_of(value, rng)
        return b"\n".join(lines) + b"\n", what

    return damaged


def jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def bytes_damage(*seeds: bytes) -> Damage:
    return lambda rng: spoil_bytes(rng.choice(seeds), rng)


def from_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def read_bytes(data: bytes) -> Any:
        path.write_bytes(data)
        path.chmod(0o600)
        return read(path)

    return read_bytes


def must(true: object, shown: Any) -> None:
    assert true, shown


def is_text(value: Any) -> None:
    assert type(value) is str, value
    value.encode()


def lines_of(name: str) -> str:
    return rf"{re.escape(name)}(:\d+: | has no lines|: \d+ ids)"


def check_ids(ids: Any, least: int = 1) -> None:
    must(isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1 and len(ids) >= least, ids)
