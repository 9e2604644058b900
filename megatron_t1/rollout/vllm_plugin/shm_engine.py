"""vLLM's end of a weight push through a shared file: verify every piece, then load, then prove that all was loaded.

The trainer's ranks wrote one file in /dev/shm (`megatron_t1.weights.sync`); every worker of every server on the host
maps it. Nothing is loaded before all digests agree, so a push refused for its bytes leaves the old weights in place.
Left out: other hosts (`gloo_engine`), and a device copy of our own: vLLM's loaders copy to wherever a parameter lives.
"""

from __future__ import annotations

import mmap
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_t1.rollout.vllm_plugin.reload import Reload, check_names
from megatron_t1.rollout.vllm_plugin.wire import OLD_WEIGHTS_KEPT, PieceSpec, TensorSpec, digest

SHM_DIR = "/dev/shm"
_DIGEST_THREADS = 2


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Sent once: the file and what lies where. Fields as in TensorSpec and PieceSpec."""

    path: str
    num_bytes: int
    tensors: list[list[Any]]
    pieces: list[list[Any]]


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """Sent per push: one digest for each piece, in the order of `ShmInit.pieces`."""

    digests: list[str]


class ShmEngine(WeightTransferEngine[ShmInit, ShmUpdate]):
    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    buffer: torch.Tensor
    tensors: list[TensorSpec]
    pieces: list[PieceSpec]
    broken: str | None = None

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        tensors = [TensorSpec(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in init_info.tensors]
        check_names(self.model_config, {tensor.name: tensor.shape for tensor in tensors})
        self.buffer = map_shared(init_info.path, init_info.num_bytes)
        self.tensors = tensors
        self.pieces = [PieceSpec(i, tuple(start), tuple(stop), rank) for i, start, stop, rank in init_info.pieces]

    def start_weight_update(self) -> None:
        if self.broken:
            raise RuntimeError(f"an earlier push left mixed weights ({self.broken}): restart this server")
        self.reload = Reload(self.model, self.model_config)

    def receive_weights(self, update_info: ShmUpdate) -> None:
        try:
            self._verify(update_info.digests)
        except BaseException as error:
            self.reload.roll_back()
            raise ValueError(f"{error}; {OLD_WEIGHTS_KEPT}") from error
        try:
            self.reload.load((tensor.name, tensor.view(self.buffer)) for tensor in self.tensors)
        except BaseException as error:
            self.broken = repr(error)
            raise

    def finish_weight_update(self) -> None:
        self.reload.finish()

    def shutdown(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def _verify(self, digests: list[str]) -> None:
        """Raises ValueError that names the first tensor, and the trainer rank that wrote it, whose bytes differ."""
        if len(digests) != len(self.pieces):
            raise ValueError(f"{len(digests)} digests for {len(self.pieces)} pieces")

        def agrees(piece: PieceSpec, expected: str) -> bool:
            view = self.tensors[piece.tensor].view(self.buffer)[piece.index]
            return digest(view, expected.partition(":")[0]) == expected

        with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
            results = list(pool.map(agrees, self.pieces, digests))
        bad = [piece for piece, good in zip(self.pieces, results, strict=True) if not good]
        if bad:
            names = ", ".join(f"{self.tensors[piece.tensor].name} (from rank {piece.rank})" for piece in bad[:3])
            raise ValueError(f"{len(bad)} of {len(self.pieces)} pieces arrived with bytes that were not sent: {names}")


def map_shared(path: str, num_bytes: int) -> torch.Tensor:
    """Maps a file of /dev/shm as uint8 [num_bytes]; refuses links, other people's files and files open to others."""
    if os.path.dirname(path) != SHM_DIR:
        raise ValueError(f"{path!r} is not in {SHM_DIR}")
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ValueError(f"{path} is not a private file of this user")
        if info.st_size != num_bytes:
            raise ValueError(f"{path} has {info.st_size} bytes, {num_bytes} were announced")
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    finally:
        os.close(fd)
