"""vLLM's end of a weight push: receive and verify, load, and prove that everything was.

Through the host's memory the bytes come in a file of /dev/shm that the trainer's ranks wrote and every worker on the
host maps, or over TCP into one that the workers of a host share. Such a push is two updates: `receive` touches no
weight and may run while the server samples; `load` comes when it is paused. So a push that is refused, late or cut off
in `receive` leaves the old weights whole. A collective push holds no second copy of the weights: `join` touches
nothing, `stream`, on a paused server, loads each tensor as it comes, and one that was cut off may begin anew. Left
out: a device copy of our own, because vLLM's loaders copy to wherever a parameter lives.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from megatron_t1.push import collective
from megatron_t1.push.digests import agrees
from megatron_t1.push.group import Group, GroupError, Invitation
from megatron_t1.push.in_vllm.reload import Reload, check_names
from megatron_t1.push.layout import Layout, PieceSpec
from megatron_t1.push.shm import HostCopy, map_shared, remove_unused
from megatron_t1.push.tcp import fetch

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or its configuration would drop it

_DIGEST_THREADS = 2


@dataclass
class Init(WeightTransferInitInfo):
    """Sent once: what lies where, as `Layout.to_json` says it, and how it comes."""

    num_bytes: int
    tensors: list[list[Any]]
    pieces: list[list[Any]]
    path: str | None = None
    """The trainer's file; None: the bytes come over TCP, or by broadcasts."""
    copy: str = ""
    """For TCP: names the file in which the workers of a host share what arrived."""
    timeout_s: float = 600.0
    """Longest silence of a trainer rank, for TCP."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """`receive` brings digests (and, for TCP, where to fetch from), `join` an invitation and the member number of this
    server's first worker, `stream` digests and the token of the group; `load` and `cancel` bring nothing."""

    step: Literal["receive", "load", "join", "stream", "cancel"]
    digests: list[str] = field(default_factory=list)
    """One for each piece, in the order of `Init.pieces`."""
    sources: list[list[Any]] = field(default_factory=list)
    """(rank, host, port) of every trainer rank that has pieces."""
    token: str = ""
    invitation: dict[str, Any] = field(default_factory=dict)
    first_member: int = 0


class Engine(WeightTransferEngine[Init, Update]):
    init_info_cls = Init
    update_info_cls = Update

    buffer: torch.Tensor | None = None
    """uint8 [num_bytes]: the trainer's file, or, for TCP, the host's, or this worker's own memory."""
    copy: HostCopy | None = None
    layout: Layout
    group: Group | None = None
    reload: Reload | None = None
    """The load that was begun and not finished: until it is, the weights are neither the old nor the new ones."""
    may_start_over: bool = False
    """That load stopped between two tensors, or after the last."""

    def init_transfer_engine(self, init_info: Init) -> None:
        layout = Layout.from_json(init_info.num_bytes, init_info.tensors, init_info.pieces)
        check_names(self.model_config, {tensor.name: tensor.shape for tensor in layout.tensors})
        self._forget_copy()
        if init_info.path is not None:
            self.buffer = map_shared(init_info.path, layout.num_bytes)
            remove_unused()  # what an earlier trainer's death left to this server alone
        elif init_info.copy:
            self.copy, self.buffer = _host_copy(init_info.copy, layout.num_bytes)
        self.layout, self.timeout_s = layout, init_info.timeout_s

    def start_weight_update(self) -> None:
        if not hasattr(self, "layout"):
            raise RuntimeError("this server was started again, and has not been told yet which tensors will come")
        if self.reload and not self.may_start_over:
            raise RuntimeError("an earlier push ended half-way in its load and left mixed weights: restart this server")

    def receive_weights(self, update_info: Update) -> None:
        if update_info.step == "receive":
            self._receive(update_info)
        elif update_info.step == "load":
            self._load()
        elif update_info.step == "join":
            self._join(update_info)
        elif update_info.step == "stream":
            self._stream(update_info)
        else:
            raise ValueError("cancelled: vLLM ends an update that nobody finished only by an error in it")

    def finish_weight_update(self) -> None:
        assert self.reload is not None
        began = time.monotonic()
        self.may_start_over = False
        self.reload.finish()
        self.reload = None
        logger.info("weights finished in %.3f s", time.monotonic() - began)

    def shutdown(self) -> None:
        self._forget_copy()
        if self.group:
            self.group.close()

    def _forget_copy(self) -> None:
        self.buffer = None
        if self.copy:
            self.copy.close()
        self.copy = None

    def _receive(self, update_info: Update) -> None:
        began = time.monotonic()
        assert self.buffer is not None
        if update_info.sources:
            sources = [(rank, host, port) for rank, host, port in update_info.sources]
            fetches = partial(fetch, sources, update_info.token, self.layout, timeout_s=self.timeout_s)
            if self.copy:
                self.copy.fill(update_info.token, fetches)
            else:
                fetches(self.buffer)
        received = time.monotonic()
        self._verify(update_info.digests, self.buffer)
        logger.info("weights received in %.3f s, verified in %.3f s", received - began, time.monotonic() - received)

    def _load(self) -> None:
        began = time.monotonic()
        buffer = self.buffer
        assert buffer is not None
        self._begin_load().load((tensor.name, tensor.view(buffer)) for tensor in self.layout.tensors)
        self.may_start_over = True
        logger.info("weights loaded in %.3f s", time.monotonic() - began)

    def _begin_load(self) -> Reload:
        if self.reload:
            self.reload.start_over()
        else:
            self.reload = Reload(self.model, self.model_config)
        self.may_start_over = False
        return self.reload

    def _join(self, update_info: Update) -> None:
        if self.group:
            self.group.close()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = Group(Invitation(**update_info.invitation), update_info.first_member + worker)

    def _stream(self, update_info: Update) -> None:
        began = time.monotonic()
        if self.group is None or self.group.token != update_info.token:
            raise GroupError("this worker is in another one")
        self._check_count(update_info.digests)
        bad: list[PieceSpec] = []
        weights = collective.receive(self.group, self.layout, self.device, update_info.digests, bad)
        try:
            self._begin_load().load(weights)
        except GroupError:
            self.may_start_over = True
            self.group.close()
            raise
        finally:
            with contextlib.suppress(GroupError):
                for _ in weights:  # whatever became of our load, the other members wait for us
                    pass
        self.may_start_over = True
        self._refuse(bad)
        logger.info("weights received and loaded in %.3f s", time.monotonic() - began)

    def _verify(self, digests: list[str], buffer: torch.Tensor) -> None:
        """Raises ValueError for pieces whose bytes differ."""
        pieces = self.layout.pieces
        self._check_count(digests)

        with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
            results = list(pool.map(agrees, (piece.view(buffer) for piece in pieces), digests))
        self._refuse([piece for piece, good in zip(pieces, results, strict=True) if not good])

    def _check_count(self, digests: list[str]) -> None:
        if len(digests) != len(self.layout.pieces):
            raise ValueError(f"{len(digests)} digests for {len(self.layout.pieces)} pieces")

    def _refuse(self, bad: list[PieceSpec]) -> None:
        """Raises ValueError that names the first tensors, and the trainer ranks they came from."""
        if bad:
            names = ", ".join(f"{piece.tensor.name} (from rank {piece.rank})" for piece in bad[:3])
            count = f"{len(bad)} of {len(self.layout.pieces)}"
            raise ValueError(f"{count} pieces arrived with bytes that were not sent: {names}")


def _host_copy(name: str, num_bytes: int) -> tuple[HostCopy | None, torch.Tensor]:
    """The copy that this host's workers share, and its bytes; where it finds no room, memory of this worker alone."""
    try:
        copy = HostCopy(name, num_bytes)
    except OSError as error:
        logger.warning(
            "%d bytes for weights that arrive find no room in /dev/shm, every worker takes them: %s", num_bytes, error
        )
        return None, torch.empty(num_bytes, dtype=torch.uint8)
    return copy, copy.buffer
