"""Files of /dev/shm that hold a model for all who map them, mode 0600: a push on one host, and what arrived on another.

`SharedFile`: the trainer's ranks write their pieces, every server on their host maps it. `HostCopy`: of the workers on
any host one fetches a push, and all have it. Both stay between pushes: the next one then touches no new page, and a
server that joins late can be brought up from the trainer's. Who has one mapped holds its flock shared, so that what can
be had exclusively is nobody's. Left out: hosts whose /dev/shm has no room for the model; there every worker keeps what
arrived to itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_t1.push.digests import Summary, summarize
from megatron_t1.push.layout import PieceSpec

SHM_DIR = Path("/dev/shm")
_PREFIX = "t1-weights-"
_MARK_BYTES = 64


class SharedFile:
    """The mapped file. Rank 0 creates it, the other ranks open its path."""

    def __init__(self, num_bytes: int, path: str | None = None) -> None:
        self.owner = path is None
        if path is None:
            self.path, self.buffer = _create(num_bytes)
        else:
            self.path, self.buffer = path, map_shared(path, num_bytes)

    def write(self, views: list[tuple[torch.Tensor, PieceSpec]]) -> Iterator[Summary]:
        """Writes this rank's pieces and yields the summary of each one's source, in order."""
        for view, piece in views:
            piece.view(self.buffer).view(view.shape).copy_(view)
            yield summarize(view, piece)

    def close(self) -> None:
        if self.owner:
            Path(self.path).unlink(missing_ok=True)


class HostCopy:
    """A push as it arrives on a host, once for all workers there that were told the same name.

    Who fetches holds the file's record lock, which the kernel takes from a killed process; the others wait for it and
    find the work done.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        """Raises OSError when /dev/shm has no room, ValueError for a name that is no name."""
        if not re.fullmatch(r"\w{16,64}", name):
            raise ValueError(f"{name!r} is no name of a copy")
        remove_unused()
        self.path = SHM_DIR / (_PREFIX + name)
        self._fd = _open_in_use(self.path)
        try:
            os.posix_fallocate(self._fd, 0, num_bytes + _MARK_BYTES)
            whole = _map(self._fd, str(self.path), num_bytes + _MARK_BYTES)
        except BaseException:
            self.close()
            raise
        self.buffer, self._mark = whole[:num_bytes], whole[num_bytes:]

    def fill(self, push: str, fetch: Callable[[torch.Tensor], None]) -> None:
        """Has `fetch` fill the buffer, unless another worker did so for this push."""
        mark = torch.frombuffer(bytearray(hashlib.blake2b(push.encode()).digest()), dtype=torch.uint8)
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            if not torch.equal(self._mark, mark):
                self._mark.zero_()
                fetch(self.buffer)
                self._mark.copy_(mark)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # a mapping that is left would keep it
        os.close(self._fd)
        remove_unused()


def _open_in_use(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # somebody removed it before we held it


def remove_unused() -> None:
    """Removes the files of this user that no process has: of those that were killed. They hold a model's memory."""
    for path in SHM_DIR.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # gone already, or in use, or another user's
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:  # else the name may be another file's by now
                    path.unlink()
            finally:
                os.close(fd)


def _create(num_bytes: int) -> tuple[str, torch.Tensor]:
    remove_unused()
    path = SHM_DIR / (_PREFIX + secrets.token_hex(16))
    fd = _open_in_use(path)
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # a full /dev/shm must fail here, not as SIGBUS while writing
        return str(path), _map(fd, str(path), num_bytes)
    except OSError as error:
        path.unlink()
        free = os.statvfs(SHM_DIR).f_bavail * os.statvfs(SHM_DIR).f_frsize
        raise RuntimeError(
            f"the weights need {num_bytes} bytes in {SHM_DIR}, {free} are free ({error.strerror}): "
            "make room there, or use rollout.transport = tcp"
        ) from None
    finally:
        os.close(fd)


def map_shared(path: str, num_bytes: int) -> torch.Tensor:
    """Maps a file of /dev/shm as uint8 [num_bytes]; refuses links, other people's files and files open to others."""
    if Path(path).parent != SHM_DIR:
        raise ValueError(f"{path!r} is not in {SHM_DIR}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path} is not on this host: use rollout.transport = tcp for servers elsewhere") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # kept as long as it is mapped
        return _map(fd, path, num_bytes)
    finally:
        os.close(fd)


def _map(fd: int, path: str, num_bytes: int) -> torch.Tensor:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ValueError(f"{path} is not a private file of this user")
    if info.st_size != num_bytes:
        raise ValueError(f"{path} has {info.st_size} bytes, {num_bytes} were announced")
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
