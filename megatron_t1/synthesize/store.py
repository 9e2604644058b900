"""Everything that was asked and what came of it, in one SQLite file: safe against kill -9, looked up by key.

`replies` outlives a run: a request (model, messages, sampling, seed) that was answered is never sent again, and an
edited prompt asks only from its stage on. `outcomes` holds the questions of the present run, to be read in their order.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Store:
    """Use as a context manager; one process at a time. What the disk refuses is an OSError that names the file."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: another process uses the file, or it is no such file, or a damaged one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            with self._errors():
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                self._db.execute("DROP TABLE IF EXISTS outcomes")
                self._db.execute("CREATE TABLE outcomes (number INTEGER PRIMARY KEY, row TEXT)")
        except BaseException:
            self._db.close()
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise ValueError(
                    f"{self._path} is used by another `t1 synthesize`: wait for it, or name another out"
                ) from None
            if isinstance(error, sqlite3.OperationalError):  # the disk's
                raise OSError(f"{self._path}: {error}; what came is kept: the same command goes on") from None
            raise ValueError(f"{self._path}: {error}; it is damaged: move it away, and all is asked again") from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @staticmethod
    def key(request: Any) -> bytes:
        return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=20).digest()

    def get(self, key: bytes) -> dict[str, Any] | None:
        with self._errors():
            row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: bytes, reply: dict[str, Any]) -> None:
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))

    def finish(self, number: int, row: dict[str, Any]) -> None:
        """What came of question number `number`."""
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?)", (number, json.dumps(row)))

    def outcomes(self) -> Iterator[dict[str, Any]]:
        """In the order of the questions."""
        with self._errors():
            for (row,) in self._db.execute("SELECT row FROM outcomes ORDER BY number"):
                yield json.loads(row)
