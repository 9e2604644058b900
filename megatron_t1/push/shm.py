"""Files of /dev/shm that hold a model for all who map them, mode 0600: a push on one host, and what arrived on another.

`SharedFile`: the trainer's ranks write their pieces, every server on their host maps it. `HostCopy`: of the workers on
any host one fetches a push, and all have it. Both stay between pushes: the next one then touches no new page, and a
server that joins late can be brought up from the trainer's. Left out: hosts whose /dev/shm has no room for the model;
there every worker keeps what arrived to itself.
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

from megatron_t1.push.digests import digest, digest_kind
from megatron_t1.push.layout import PieceSpec

SHM_DIR = Path("/dev/shm")
_FILE_NAME = re.compile(r"t1-weights-(\d+)-\w+")
_HOST_COPY = "t1-arrived-"
_MARK_BYTES = 64


class SharedFile:
    """The mapped file. Rank 0 creates it, the other ranks open its path."""

    def __init__(self, num_bytes: int, path: str | None = None) -> None:
        self.owner = path is None
        self.path = path or _create(num_bytes)
        self.buffer = map_shared(self.path, num_bytes)

    def write(self, views: list[tuple[torch.Tensor, PieceSpec]]) -> Iterator[str]:
        """Writes this rank's pieces and yields the digest of each one's source, in order."""
        for view, piece in views:
            piece.view(self.buffer).view(view.shape).copy_(view)
            yield digest(view, digest_kind(view, piece.shape))

    def close(self) -> None:
        if self.owner:
            Path(self.path).unlink(missing_ok=True)


class HostCopy:
    """A push as it arrives on a host, once for all workers there that were told the same name.

    Who uses the file holds its flock shared, so that a file which can be had exclusively is nobody's. Who fetches holds
    its record lock, which the kernel takes from a killed process; the others wait for it and find the work done.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        """Raises OSError when /dev/shm has no room, ValueError for a name that is no name."""
        if not re.fullmatch(r"\w{16,64}", name):
            raise ValueError(f"{name!r} is no name of a copy")
        for path in SHM_DIR.glob(_HOST_COPY + "*"):
            _remove_unused(path)
        self.path = SHM_DIR / (_HOST_COPY + name)
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
        _remove_unused(self.path)


def _open_in_use(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # somebody removed it before we held it


def _remove_unused(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or in use, or another user's
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(fd)


def _create(num_bytes: int) -> str:
    _sweep()
    path = str(SHM_DIR / f"t1-weights-{os.getpid()}-{secrets.token_hex(8)}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # a full /dev/shm must fail here, not as SIGBUS while writing
    except OSError as error:
        os.unlink(path)
        free = os.statvfs(SHM_DIR).f_bavail * os.statvfs(SHM_DIR).f_frsize
        raise RuntimeError(
            f"the weights need {num_bytes} bytes in {SHM_DIR}, {free} are free ({error.strerror}): "
            "make room there, or use rollout.transport = tcp"
        ) from None
    finally:
        os.close(fd)
    return path


def map_shared(path: str, num_bytes: int) -> torch.Tensor:
    """Maps a file of /dev/shm as uint8 [num_bytes]; refuses links, other people's files and files open to others."""
    if Path(path).parent != SHM_DIR:
        raise ValueError(f"{path!r} is not in {SHM_DIR}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path} is not on this host: use rollout.transport = tcp for servers elsewhere") from None
    try:
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


def _sweep() -> None:
    """Removes the files of this user's trainers that were killed: they hold a whole model's memory."""
    for path in SHM_DIR.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match and path.stat().st_uid == os.getuid() and not Path(f"/proc/{match[1]}").exists():
            path.unlink(missing_ok=True)
