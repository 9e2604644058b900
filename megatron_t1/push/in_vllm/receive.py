"""vLLM's end of a weight push through host memory: receive and verify everything, then load, and prove that all was.

The bytes come in a file of /dev/shm that the trainer's ranks wrote and every worker on the host maps, or over TCP into
a buffer of each worker's own. A push is two updates: `receive` touches no weight and may run while the server samples;
`load` comes when it is paused. So a push that is refused, late or cut off in `receive` leaves the old weights whole.
Left out: a device copy of our own, because vLLM's loaders copy to wherever a parameter lives.
"""

from __future__ import annotations

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

from megatron_t1.push.digests import digest
from megatron_t1.push.in_vllm.reload import Reload, check_names
from megatron_t1.push.layout import Layout, PieceSpec
from megatron_t1.push.shm import map_shared
from megatron_t1.push.tcp import fetch

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or its configuration would drop it

_DIGEST_THREADS = 2


@dataclass
class HostInit(WeightTransferInitInfo):
    """Sent once: what lies where, as `Layout.to_json` says it, and how it comes."""

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
    layout: Layout
    reload: Reload | None = None
    """The load that was begun and not finished: until it is, the weights are neither the old nor the new ones."""

    def init_transfer_engine(self, init_info: HostInit) -> None:
        layout = Layout.from_json(init_info.num_bytes, init_info.tensors, init_info.pieces)
        check_names(self.model_config, {tensor.name: tensor.shape for tensor in layout.tensors})
        if init_info.path is None:
            self.buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
        else:
            self.buffer = map_shared(init_info.path, layout.num_bytes)
        self.layout, self.timeout_s = layout, init_info.timeout_s

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
            fetch(sources, update_info.token, self.layout, self.buffer, self.timeout_s)
        received = time.monotonic()
        self._verify(update_info.digests)
        logger.info("weights received in %.3f s, verified in %.3f s", received - began, time.monotonic() - received)

    def _load(self) -> None:
        began = time.monotonic()
        self.reload = Reload(self.model, self.model_config)
        self.reload.load((tensor.name, tensor.view(self.buffer)) for tensor in self.layout.tensors)
        logger.info("weights loaded in %.3f s", time.monotonic() - began)

    def _verify(self, digests: list[str]) -> None:
        """Raises ValueError that names the first tensors, and the trainer ranks they came from, whose bytes differ."""
        pieces = self.layout.pieces
        if len(digests) != len(pieces):
            raise ValueError(f"{len(digests)} digests for {len(pieces)} pieces")

        def agrees(piece: PieceSpec, expected: str) -> bool:
            return digest(piece.view(self.buffer), expected.partition(":")[0]) == expected

        with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
            results = list(pool.map(agrees, pieces, digests))
        bad = [piece for piece, good in zip(pieces, results, strict=True) if not good]
        if bad:
            names = ", ".join(f"{piece.tensor.name} (from rank {piece.rank})" for piece in bad[:3])
            raise ValueError(f"{len(bad)} of {len(pieces)} pieces arrived with bytes that were not sent: {names}")
