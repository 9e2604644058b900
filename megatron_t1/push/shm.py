"""A push through one shared file, both ends: every rank writes its pieces, every server on the host maps it.

The file lives in /dev/shm, mode 0600, as large as the model, and stays between pushes: the second push then touches no
new page, and a server that joins late can be brought up from it. Left out: other hosts (transport tcp or collective).
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_t1.push.digests import digest, digest_kind
from megatron_t1.push.layout import PieceSpec

SHM_DIR = Path("/dev/shm")
_FILE_NAME = re.compile(r"t1-weights-(\d+)-\w+")


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
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ValueError(f"{path} is not a private file of this user")
        if info.st_size != num_bytes:
            raise ValueError(f"{path} has {info.st_size} bytes, {num_bytes} were announced")
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    finally:
        os.close(fd)


def _sweep() -> None:
    """Removes the files of this user's trainers that were killed: they hold a whole model's memory."""
    for path in SHM_DIR.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match and path.stat().st_uid == os.getuid() and not Path(f"/proc/{match[1]}").exists():
            path.unlink(missing_ok=True)
