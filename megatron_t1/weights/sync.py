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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_t1.rollout.config import RolloutConfig
from megatron_t1.rollout.server import Server, Servers
from megatron_t1.weights.fanout import Fanout, SyncError
from megatron_t1.weights.hf_io import tensor_files
from megatron_t1.weights.ops import Piece
from megatron_t1.weights.shm import SharedFile, init_info, layout
from megatron_t1.weights.stream import Plan

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
        self._mine = self.plan.mine()
        tensors, self._pieces, self.num_bytes = layout(self.plan)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._file = SharedFile(self.num_bytes) if self.rank == 0 else None
        path = self._from_rank_0("set-up", self._file.path if self._file else None)
        self._file = self._file or SharedFile(self.num_bytes, path)
        self._init_info = {"path": path, **init_info(tensors, self._pieces, self.num_bytes)}
        self._fanout = Fanout(servers) if servers is not None else None
        self._version: int | None = None
        self._digests: list[str] = []
        self._pending: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="push")

    def push(self, version: int) -> PushReport:
        """Brings every live server to `version`. Raises SyncError, on every rank, when none got there."""
        self.begin_push(version)
        return self.finish_push()

    def begin_push(self, version: int) -> None:
        """Copies the weights as they are now and starts the servers on them; training may go on when it returns."""
        began = time.monotonic()
        assert self._file is not None
        digests = list(self._file.write(self._mine, self._tensors))
        written = time.monotonic()
        if self.rank == 0:
            delivered = [iter(digests)]
            for rank in range(1, self.world_size):
                delivered.append(iter(self._receive(rank, "write", self.cfg.sync_timeout_s)))
            self._digests = [next(delivered[piece.rank]) for piece in self._pieces]
        else:
            self._send(0, digests)
        self._version = version
        self._began, self._stall_s = began, time.monotonic() - began
        self._written = {"write": written - began, "ranks": time.monotonic() - written}
        if self.servers is not None:
            self.servers.poll()
            targets = [s for s in self.servers.all if s.ready and s.unusable is None and not s.exited()]
            self._pending = self._background.submit(self._push_to, version, targets)

    def finish_push(self) -> PushReport:
        """Waits until the servers hold the weights of the last `begin_push`."""
        if self.rank == 0:
            assert self._pending is not None
            assert self._fanout is not None
            error = self._pending.exception()
            outcome: dict[str, Any] = {
                "error": None if error is None else str(error) or repr(error),
                "seconds": self._written | self._fanout.seconds,
                "failed": self._fanout.failed,
                "total_s": time.monotonic() - self._began,
            }
            for rank in range(1, self.world_size):
                self._send(rank, outcome)
            if error is not None:
                raise error
        else:
            outcome = self._receive(0, "servers", 2 * self.cfg.sync_timeout_s + _GRACE_S)
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
        assert self.servers is not None
        self.servers.poll()
        late = [
            server
            for server in self.servers.all
            if server.ready and server.unusable is None and not server.exited() and server.version != self._version
        ]
        if late and self._version is not None:
            self._push_to(self._version, late)
        return [server for server in late if server.version == self._version]

    def close(self) -> None:
        self._background.shutdown(wait=False)
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _push_to(self, version: int, targets: list[Server]) -> None:
        fanout = self._fanout
        assert fanout is not None
        fanout.open(version, targets)
        fanout.init_weight_transfer_engine(self._init_info)
        fanout.start_weight_update()
        fanout.update_weights({"digests": self._digests})
        fanout.finish_weight_update()

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
        try:
            size = torch.zeros(1, dtype=torch.int64)
            _wait(dist.irecv(size, rank, group=self._group), timeout_s)
            message = torch.empty(int(size), dtype=torch.uint8)
            _wait(dist.irecv(message, rank, group=self._group), timeout_s)
        except RuntimeError as error:
            raise SyncError(
                f"weight push, phase {phase}: trainer rank {rank} ended or was silent for {timeout_s:g} s ({error})"
            ) from None
        return json.loads(message.numpy().tobytes())


def _wait(work: Any, timeout_s: float) -> None:
    work.wait(timedelta(seconds=timeout_s))


def folder_pieces(model_dir: Path) -> list[Piece]:
    """Whole tensors of a Hugging Face folder, to push a folder into running servers from one process."""
    pieces = []
    for name, path in tensor_files(model_dir).items():
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        index = tuple(slice(0, size) for size in tensor.shape)
        pieces.append(Piece(name=name, shape=tuple(tensor.shape), index=index, view=tensor))
    return pieces
