"""One process at a time: `locked` keeps all others out of a folder while this one writes there.

A file in the folder names who is at work (host, process, turn of a batch job) and is touched every few seconds. Who
finds one is refused, unless its owner is gone: a process of this host that has ended, an earlier turn of the same batch
job, or one that has not touched it for minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from megatron_t1.files import read_json
from megatron_t1.warn import warn

FILE = "lock.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one on every machine, and after every start of it."""
_TOUCHED_EVERY_S, _GONE_AFTER_S = 10.0, 300.0


class _Owner(TypedDict):
    host: str
    boot: str
    processes: str
    process: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    started: int | None
    job: str
    turn: str
    id: NotRequired[str]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Raises:
        ValueError: another process is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / FILE, _me()
    _take(path, mine)
    ended = threading.Event()
    threading.Thread(target=_touch, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    number = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _BOOT_ID.read_text().strip(),
        "processes": os.readlink("/proc/self/ns/pid"),  # of which the number below is one: a container counts anew
        "process": number,
        "started": _started(number),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "turn": os.environ.get("T1_TURN", ""),
        "id": secrets.token_hex(8),
    }


def _started(number: int) -> int | None:
    """When a process of this host began, in clock ticks since the start of the host; None: it has ended."""
    try:
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])


def _take(path: Path, mine: dict[str, Any]) -> None:
    text = path.with_name(f".{FILE}.{mine['id']}.mine")
    text.write_text(json.dumps(mine))
    try:
        while not _linked(text, path):
            other = _read(path)
            why = _why_gone(path, other, mine)
            if why is None:
                raise ValueError(
                    f"{path.parent} is in use: {_describe(other)} is at work there. Wait for its end, or name another "
                    f"run_dir; if it is gone, remove {path}"
                )
            left = path.with_name(f".{FILE}.{mine['id']}")
            with contextlib.suppress(FileNotFoundError):  # another was faster and has removed it
                os.rename(path, left)
                if _read(left) == other:
                    warn(f"{path.parent} was left in use by {_describe(other)}, which {why}")
                else:  # another was faster and is at work: its file goes back
                    _linked(left, path)
                left.unlink()
    finally:
        text.unlink()


def _linked(source: Path, path: Path) -> bool:
    """Whether `path` is now the file `source`: it appears with all its contents, or not at all."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """None: not there, or cut off while it was written, or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(path, _Owner)
    return None


def _why_gone(path: Path, other: dict[str, Any] | None, mine: dict[str, Any]) -> str | None:
    if other and all(other.get(name) == mine[name] for name in ("boot", "processes")):
        return None if _started(other["process"]) == other["started"] else "has ended"
    # Whoever numbers turns (slurm/lib.sh) has seen the end of one before it begins the next.
    if other and mine["turn"] and other.get("job") == mine["job"] and other.get("turn") != mine["turn"]:
        return "was an earlier turn of this job"
    probe = path.with_name(f".{FILE}.{mine['id']}.now")  # the file system's clock, which may not be ours
    probe.touch()
    try:
        age = probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return "has ended"
    finally:
        probe.unlink()
    return f"has not touched it for {age:.0f} s" if age > _GONE_AFTER_S else None


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('process')} on {owner.get('host')}{job}"


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_TOUCHED_EVERY_S):
        with contextlib.suppress(OSError):
            os.utime(path)
