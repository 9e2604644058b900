"""New weights from the trainer's ranks into every server, proved: `WeightSync.push(version)`, called on every rank.

What one push shows before a sample may come from it: the ranks' parts cover every tensor exactly once (`Plan`); the
server's model has the same names and shapes; every part arrived with the bytes that its owner holds (a digest each);
every parameter was filled; the prefix cache of the old weights is gone; the server reports the new version, and every
sample is stamped with it. Every wait has a deadline, and an error names the server or rank, the phase and the tensor.

The trainer stalls only while it writes: `begin_push` returns when this rank's numbers are copied, `finish_push` waits
for the servers.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_t1.rollout.config import RolloutConfig
from megatron_t1.rollout.server import Server, Servers
from megatron_t1.weights.fanout import Fanout, SyncError
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.ops import Piece
from megatron_t1.weights.shm import layout
from megatron_t1.weights.stream import Plan
from megatron_t1.weights.transports import GlooTransport, NcclTransport, ShmTransport, Transport

# Beyond its own deadline, what a rank waits for another to notice and report a failure.
_GRACE_S = 30.0


@dataclass(frozen=True)
class PushReport:
    """What a push cost. The same on every rank, but for `stall_s`."""

    version: int
    num_bytes: int
    stall_s: float
    """Seconds in which this rank could not train: planning, writing, waiting for the other ranks to have written."""
    total_s: float
    """From the begin to the last server's resumption, on rank 0."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase, on rank 0: write, ranks, pause, init, start, update, finish, cache, check, resume."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server name -> why it was left out; empty when all servers hold the new weights."""


class WeightSync:
    """Pushes the numbers behind `pieces` into the servers. Collective over all ranks, as are its methods."""

    def __init__(self, pieces: list[Piece], cfg: RolloutConfig, servers: Servers | None) -> None:
        """`servers`: on rank 0; None elsewhere. `pieces` stay views: each push reads what they hold then."""
        self.cfg = cfg
        self.servers = servers
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if (self.rank == 0) != (servers is not None):
            raise ValueError(f"WeightSync: rank {self.rank} got servers={servers}; rank 0, and only it, has them")
        # A gloo group of its own: the training groups may be NCCL, and none of them has our deadline.
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * cfg.sync_timeout_s + _GRACE_S))
            if self.world_size > 1
            else None
        )
        self.plan = Plan(pieces, self._group)
        self.num_bytes = layout(self.plan)[2]
        self._transport = self._open_transport()
        self._fanout = Fanout(servers) if servers is not None else None
        self._version: int | None = None
        self._digests: list[str] = []
        self._pending: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="push")

    def _open_transport(self) -> Transport:
        name = self._from_rank_0("set-up", self.servers.transport if self.servers else None)
        if name == "shm":
            return ShmTransport(self.plan, self._from_rank_0)
        if name == "gloo":
            return GlooTransport(self.plan, self._from_rank_0, self.cfg.sync_timeout_s)
        return NcclTransport(self.plan, self._from_rank_0)

    def push(self, version: int) -> PushReport:
        """Brings every live server to `version`. Raises SyncError, on every rank, when none got there."""
        self.begin_push(version)
        return self.finish_push()

    def next_version(self) -> int:
        """One above the newest that a server holds. Collective."""
        newest = max((server.version for server in self.servers.all), default=0) if self.servers else 0
        return int(self._from_rank_0("version", newest + 1))

    def begin_push(self, version: int) -> None:
        """Copies the weights as they are now and starts the servers on them; training may go on when it returns."""
        began = time.monotonic()
        digests = self._transport.prepare()
        written = time.monotonic()
        if self.rank == 0:
            delivered = [iter(digests)]
            for rank in range(1, self.world_size):
                delivered.append(iter(self._receive(rank, "write", self.cfg.sync_timeout_s)))
            owners = [part.rank for tensor in self.plan.tensors for part in tensor.parts]
            # nccl makes no digests
            self._digests = [digest for rank in owners if (digest := next(delivered[rank], None)) is not None]
        else:
            self._send(0, digests)
        self._version, self._began = version, began
        self._seconds = {"write": written - began, "ranks": time.monotonic() - written}
        self._pending = self._background.submit(self._deliver, version, self._live_servers())
        if not self._transport.background:
            wait([self._pending])
        self._stall_s = time.monotonic() - began

    def finish_push(self) -> PushReport:
        """Waits until the servers hold the weights of the last `begin_push`."""
        assert self._pending is not None
        error = self._pending.exception()
        if self._fanout is not None:
            outcome: dict[str, Any] = {
                "error": None if error is None else str(error) or repr(error),
                "seconds": self._seconds | self._fanout.seconds,
                "failed": self._fanout.failed,
                "total_s": time.monotonic() - self._began,
            }
            for rank in range(1, self.world_size):
                self._send(rank, outcome)
        else:
            outcome = self._receive(0, "servers", 2 * self.cfg.sync_timeout_s + _GRACE_S)
        if error is not None:
            raise error
        if outcome["error"] is not None:
            raise SyncError(outcome["error"])
        assert self._version is not None
        return PushReport(
            version=self._version,
            num_bytes=self.num_bytes,
            stall_s=self._stall_s,
            total_s=outcome["total_s"],
            seconds=outcome["seconds"],
            failed=outcome["failed"],
        )

    def bring_up(self) -> list[Server]:
        """Pushes the last version into servers that became ready since, from the shared file. Rank 0 alone.

        Returns those that now hold it. Call `Servers.revive` first to start dead ones anew.
        """
        if not self._transport.background:
            raise SyncError("bring_up needs transport shm; with others a late server is reached by the next push")
        late = [server for server in self._live_servers() if server.version != self._version]
        if late and self._version is not None:
            self._deliver(self._version, late)
        return [server for server in late if server.version == self._version]

    def close(self) -> None:
        self._background.shutdown(wait=False)
        self._transport.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _live_servers(self) -> list[Server]:
        if self.servers is None:
            return []
        self.servers.poll()
        return [s for s in self.servers.all if s.ready and s.unusable is None and not s.exited()]

    def _deliver(self, version: int, targets: list[Server]) -> None:
        if self.servers is not None:
            self.servers.pushing = True
        try:
            self._transport.deliver(self._fanout, version, targets, self._digests)
        finally:
            if self.servers is not None:
                self.servers.pushing = False

    def _from_rank_0(self, phase: str, value: Any) -> Any:
        if self.rank != 0:
            return self._receive(0, phase, self.cfg.sync_timeout_s)
        for rank in range(1, self.world_size):
            self._send(rank, value)
        return value

    def _send(self, rank: int, value: Any) -> None:
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            dist.send(torch.tensor([len(message)]), rank, group=self._group)
            dist.send(message, rank, group=self._group)
        except RuntimeError as error:
            raise SyncError(f"rank {self.rank} could not reach rank {rank}: {error}") from None

    def _receive(self, rank: int, phase: str, timeout_s: float) -> Any:
        """A message of one rank, so that the rank that is missing can be named."""
        timeout = timedelta(seconds=timeout_s)
        try:
            size = torch.zeros(1, dtype=torch.int64)
            dist.irecv(size, rank, group=self._group).wait(timeout)
            message = torch.empty(int(size), dtype=torch.uint8)
            dist.irecv(message, rank, group=self._group).wait(timeout)
        except RuntimeError as error:
            raise SyncError(
                f"weight push, phase {phase}: trainer rank {rank} ended or was silent for {timeout_s:g} s ({error})"
            ) from None
        return json.loads(message.numpy().tobytes())


def folder_pieces(model_dir: Path) -> list[Piece]:
    """Whole tensors of a Hugging Face folder, to push a folder into running servers from one process."""
    folder = HFFolder(model_dir)
    return [
        Piece(name=name, shape=info.shape, index=tuple(slice(0, n) for n in info.shape), view=folder.read(name))
        for name, info in folder.tensors.items()
    ]
