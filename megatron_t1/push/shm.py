"""The trainer's end of a push through one shared file: every rank writes its parts, every server on the host maps it.

The file lives in /dev/shm, mode 0600, as large as the model, and stays between pushes: the second push then touches no
new page, and a server that joins late can be brought up from it. Left out: other hosts (transport tcp or nccl).
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_t1.models.ops import Piece
from megatron_t1.push.wire import ALIGNMENT, PieceSpec, TensorSpec, digest, digest_kind
from megatron_t1.weights.plan import Plan

SHM_DIR = Path("/dev/shm")
_FILE_NAME = re.compile(r"t1-weights-(\d+)-\w+")


def layout(plan: Plan) -> tuple[list[TensorSpec], list[PieceSpec], int]:
    """Where each tensor lies in the file, which parts it is made of, and the file's size in bytes."""
    tensors, pieces, offset = [], [], 0
    for i, tensor in enumerate(plan.tensors):
        spec = TensorSpec(tensor.name, str(tensor.dtype).removeprefix("torch."), tensor.shape, offset)
        tensors.append(spec)
        offset = -(-(offset + spec.num_bytes) // ALIGNMENT) * ALIGNMENT
        for part in tensor.parts:
            start, stop = zip(*part.index, strict=True) if part.index else ((), ())
            pieces.append(PieceSpec(i, tuple(start), tuple(stop), part.rank))
    return tensors, pieces, offset


def init_info(tensors: Sequence[TensorSpec], pieces: Sequence[PieceSpec], num_bytes: int) -> dict[str, Any]:
    """What every worker is told once, as JSON."""
    return {
        "num_bytes": num_bytes,
        "tensors": [[t.name, t.dtype, t.shape, t.offset] for t in tensors],
        "pieces": [[p.tensor, p.start, p.stop, p.rank] for p in pieces],
    }


class SharedFile:
    """The mapped file. Rank 0 creates it, the other ranks open its path."""

    def __init__(self, num_bytes: int, path: str | None = None) -> None:
        self.owner = path is None
        if path is None:
            _sweep()
            path = str(SHM_DIR / f"t1-weights-{os.getpid()}-{secrets.token_hex(8)}")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, num_bytes)  # a full /dev/shm must fail here, not as SIGBUS while writing
            except OSError as error:
                os.close(fd)
                os.unlink(path)
                free = os.statvfs(SHM_DIR).f_bavail * os.statvfs(SHM_DIR).f_frsize
                raise RuntimeError(
                    f"the weights need {num_bytes} bytes in {SHM_DIR}, {free} are free ({error.strerror}): "
                    "make room there, or use rollout.transport=tcp"
                ) from None
        else:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.path = path
        try:
            self.buffer = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        finally:
            os.close(fd)

    def write(self, mine: Sequence[Piece], tensors: dict[str, TensorSpec]) -> Iterator[str]:
        """Writes this rank's pieces and yields the digest of each one's source, in order."""
        for piece in mine:
            target = tensors[piece.name].view(self.buffer)[piece.index]
            target.view(piece.view.shape).copy_(piece.view)
            yield digest(piece.view, digest_kind(piece.view, target.shape))

    def close(self) -> None:
        if self.owner:
            Path(self.path).unlink(missing_ok=True)


def _sweep() -> None:
    """Removes the files of this user's trainers that were killed: they hold a whole model's memory."""
    for path in SHM_DIR.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match and path.stat().st_uid == os.getuid() and not Path(f"/proc/{match[1]}").exists():
            path.unlink(missing_ok=True)
