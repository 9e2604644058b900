"""vLLM's end of a weight push through host memory: receive and verify everything, then load, and prove that all was.

The bytes come in a file of /dev/shm that the trainer's ranks wrote and every worker on the host maps, or over TCP into
a buffer of each worker's own. A push is two updates: `receive` touches no weight and may run while the server samples;
`load` comes when it is paused. So a push that is refused, late or cut off in `receive` leaves the old weights whole.
Left out: a device copy of our own, because vLLM's loaders copy to wherever a parameter lives.
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from megatron_t1.push.in_vllm.reload import Reload, check_names
from megatron_t1.push.tcp import fetch
from megatron_t1.push.wire import PieceSpec, TensorSpec, digest

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
    """The shared file; None: the bytes come over TCP."""
    timeout_s: float = 600.0
    """Longest silence of a trainer rank, for TCP."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """`receive` brings digests (and, for TCP, where to fetch from); `load` and `cancel` bring nothing."""

    step: Literal["receive", "load", "cancel"]
    digests: list[str] = field(default_factory=list)
    """One for each piece, in the order of `HostInit.pieces`."""
    sources: list[list[Any]] = field(default_factory=list)
    """(rank, host, port) of every trainer rank that has pieces."""
    token: str = ""


class HostEngine(WeightTransferEngine[HostInit, HostUpdate]):
    init_info_cls = HostInit
    update_info_cls = HostUpdate

    buffer: torch.Tensor
    """uint8 [num_bytes]: the shared file, or this worker's own memory."""
    tensors: list[TensorSpec]
    pieces: list[PieceSpec]
    reload: Reload | None = None
    """The load that was begun and not finished: until it is, the weights are neither the old nor the new ones."""

    def init_transfer_engine(self, init_info: HostInit) -> None:
        tensors = [TensorSpec(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in init_info.tensors]
        check_names(self.model_config, {tensor.name: tensor.shape for tensor in tensors})
        if init_info.path is None:
            self.buffer = torch.empty(init_info.num_bytes, dtype=torch.uint8)
        else:
            self.buffer = map_shared(init_info.path, init_info.num_bytes)
        self.tensors = tensors
        self.timeout_s = init_info.timeout_s
        self.pieces = [PieceSpec(i, tuple(start), tuple(stop), rank) for i, start, stop, rank in init_info.pieces]

    def start_weight_update(self) -> None:
        if self.reload:
            raise RuntimeError("an earlier push ended half-way in its load and left mixed weights: restart this server")

    def receive_weights(self, update_info: HostUpdate) -> None:
        if update_info.step == "receive":
            self._receive(update_info)
        elif update_info.step == "load":
            self._load()
        else:
            raise ValueError("cancelled: vLLM ends an update that nobody finished only by an error in it")

    def finish_weight_update(self) -> None:
        assert self.reload is not None
        began = time.monotonic()
        self.reload.finish()
        self.reload = None
        logger.info("weights finished in %.3f s", time.monotonic() - began)

    def shutdown(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def _receive(self, update_info: HostUpdate) -> None:
        began = time.monotonic()
        if update_info.sources:
            sources = [(rank, host, port) for rank, host, port in update_info.sources]
            fetch(sources, update_info.token, self.tensors, self.pieces, self.buffer, self.timeout_s)
        received = time.monotonic()
        self._verify(update_info.digests)
        logger.info("weights received in %.3f s, verified in %.3f s", received - began, time.monotonic() - received)

    def _load(self) -> None:
        began = time.monotonic()
        self.reload = Reload(self.model, self.model_config)
        self.reload.load((tensor.name, tensor.view(self.buffer)) for tensor in self.tensors)
        logger.info("weights loaded in %.3f s", time.monotonic() - began)

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
        raise ValueError(f"{path} is not on this host: use rollout.transport=tcp for servers elsewhere") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ValueError(f"{path} is not a private file of this user")
        if info.st_size != num_bytes:
            raise ValueError(f"{path} has {info.st_size} bytes, {num_bytes} were announced")
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    finally:
        os.close(fd)
