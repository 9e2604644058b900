"""vLLM's end of a weight push through host memory: receive, verify every piece, load, prove that all was loaded.

The bytes come either in a file of /dev/shm that the trainer's ranks wrote and every worker on the host maps, or over
TCP (gloo) into a buffer of each worker's own. Nothing is loaded before all digests agree, so a push refused for its
bytes leaves the old weights in place. Every gloo push opens a process group of its own (trainer rank 0 and all
workers): servers may come and go between pushes. Left out: authentication of gloo's TCP connections (use it in a
trusted network), and a device copy of our own: vLLM's loaders copy to wherever a parameter lives.
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from megatron_t1.rollout.vllm_plugin.reload import Reload, check_names
from megatron_t1.rollout.vllm_plugin.wire import OLD_WEIGHTS_KEPT, PieceSpec, TensorSpec, digest

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or its configuration would drop it

SHM_DIR = "/dev/shm"
_DIGEST_THREADS = 2


@dataclass
class HostInit(WeightTransferInitInfo):
    """Sent once: what lies where. Fields as in TensorSpec and PieceSpec."""

    num_bytes: int
    tensors: list[list[Any]]
    pieces: list[list[Any]]
    path: str | None = None
    """The shared file; None: the bytes come over gloo."""


@dataclass
class Meeting:
    """The process group of one gloo push."""

    host: str
    port: int
    """Of the trainer's TCPStore."""
    world_size: int
    timeout_s: float


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """Sent per push."""

    digests: list[str]
    """One for each piece, in the order of `HostInit.pieces`."""
    meeting: dict[str, Any] | None = None
    """A Meeting, for gloo."""
    rank_offset: int = 0
    """Rank of this server's first worker in the meeting."""


class HostEngine(WeightTransferEngine[HostInit, HostUpdate]):
    init_info_cls = HostInit
    update_info_cls = HostUpdate

    buffer: torch.Tensor
    """uint8 [num_bytes]: the shared file, or this worker's own memory."""
    tensors: list[TensorSpec]
    pieces: list[PieceSpec]
    broken: str | None = None
    """Why the weights are mixed: the error that ended a load half-way."""

    def init_transfer_engine(self, init_info: HostInit) -> None:
        tensors = [TensorSpec(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in init_info.tensors]
        check_names(self.model_config, {tensor.name: tensor.shape for tensor in tensors})
        if init_info.path is None:
            self.buffer = torch.empty(init_info.num_bytes, dtype=torch.uint8)
        else:
            self.buffer = map_shared(init_info.path, init_info.num_bytes)
        self.tensors = tensors
        self.pieces = [PieceSpec(i, tuple(start), tuple(stop), rank) for i, start, stop, rank in init_info.pieces]

    def start_weight_update(self) -> None:
        if self.broken:
            raise RuntimeError(f"an earlier push left mixed weights ({self.broken}): restart this server")
        self.reload = Reload(self.model, self.model_config)

    def receive_weights(self, update_info: HostUpdate) -> None:
        began = time.monotonic()
        try:
            if update_info.meeting is not None:
                self._receive(Meeting(**update_info.meeting), update_info.rank_offset)
            received = time.monotonic()
            self._verify(update_info.digests)
        except BaseException as error:
            self.reload.roll_back()
            raise ValueError(f"{error}; {OLD_WEIGHTS_KEPT}") from error
        verified = time.monotonic()
        try:
            self.reload.load((tensor.name, tensor.view(self.buffer)) for tensor in self.tensors)
        except BaseException as error:
            self.broken = repr(error)
            raise
        logger.info(
            "weights received in %.3f s, verified in %.3f s, loaded in %.3f s",
            received - began,
            verified - received,
            time.monotonic() - verified,
        )

    def finish_weight_update(self) -> None:
        self.reload.finish()

    def shutdown(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def _receive(self, meeting: Meeting, rank_offset: int) -> None:
        config = self.parallel_config
        rank = rank_offset + config.data_parallel_index * config.world_size + config.rank
        timeout = timedelta(seconds=meeting.timeout_s)
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
        group = dist.ProcessGroupGloo(store, rank, meeting.world_size, timeout)
        for tensor in self.tensors:
            group.broadcast(tensor.bytes_in(self.buffer), 0).wait()

    def _verify(self, digests: list[str]) -> None:
        """Raises ValueError that names the first tensors, and the trainer ranks they came from, whose bytes differ."""
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
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path} is not on this host: use rollout.transport=gloo for servers elsewhere") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ValueError(f"{path} is not a private file of this user")
        if info.st_size != num_bytes:
            raise ValueError(f"{path} has {info.st_size} bytes, {num_bytes} were announced")
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    finally:
        os.close(fd)
