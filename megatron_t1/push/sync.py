"""New weights from the trainer's ranks into every server, proved: `WeightSync.push(version)`, called on every rank.

What one push shows before a sample may come from it: the ranks' parts cover every tensor exactly once (`Plan`); the
server's model has the same names and shapes; every part arrived with the bytes that its owner holds (a digest each);
every parameter was filled; the prefix cache of the old weights is gone; the server reports the new version, and every
sample is stamped with it. Every wait has a deadline, and an error names the server or rank, the phase and the tensor.

The trainer stalls only while its numbers are read: `begin_push` returns when it may change them, `finish_push` waits
for the servers. What lies between runs beside the servers' loading.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_t1.models.weight_map import Piece
from megatron_t1.push.digests import Summary
from megatron_t1.push.fanout import Fanout
from megatron_t1.push.layout import Layout
from megatron_t1.push.ranks import NoServerError, Ranks, SyncError
from megatron_t1.push.transports import Push, open_transport
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers
from megatron_t1.warn import warn
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.plan import Plan
from megatron_t1.weights.sums import fingerprint


@dataclass(frozen=True)
class PushReport:
    """What a push cost. The same on every rank, but for `stall_s`."""

    version: int
    num_bytes: int
    stall_s: float
    """Seconds in which this rank could not train: writing or sending, waiting for the other ranks, and what was left
    of the servers' work when `finish_push` was called."""
    total_s: float
    """From the begin to the last server's resumption, on rank 0."""
    began: float
    """When `begin_push` was called on this rank, by `time.monotonic()`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase on rank 0: write, ranks, then those of `Fanout` from init to resume."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server name -> why it was left out; empty when all servers hold the new weights."""


class WeightSync:
    """Pushes the numbers behind `pieces` into the servers. Collective over all ranks, as are its methods."""

    def __init__(self, pieces: list[Piece], cfg: RolloutConfig, servers: Servers | None) -> None:
        """`servers`: on rank 0; None elsewhere. `pieces` stay views: each push reads what they hold then."""
        self.servers = servers
        self.ranks = Ranks(cfg.sync_timeout_s)
        if (self.ranks.rank == 0) != (servers is not None):
            raise ValueError(f"WeightSync: rank {self.ranks.rank} got servers={servers}; rank 0, and only it, has them")
        self.plan = Plan(pieces, self.ranks.group)
        self.layout = Layout.of(self.plan)
        self._transport = open_transport(self.plan, self.layout, self.ranks, cfg, servers)
        self._fanout = Fanout(servers) if servers is not None else None
        self.fingerprint = ""
        """On rank 0: digest of the numbers of the last push, the same for every layout."""
        self._version: int | None = None
        self._digests: list[str] = []
        self._pending: Future[float] | None = None
        # A thread starts on CUDA device 0, whatever its process works on.
        on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else (None, ())
        self._background = ThreadPoolExecutor(1, "push", *on_device)

    def push(self, version: int) -> PushReport:
        """Brings every live server to `version`.

        Raises, on every rank:
            NoServerError: none got there.
            SyncError: a trainer rank ended or was silent.
        """
        self.begin_push(version)
        return self.finish_push()

    def next_version(self) -> int:
        """One above the newest that a server holds."""
        newest = max((server.version for server in self.servers.all), default=0) if self.servers else 0
        return int(self.ranks.from_0("version", newest + 1))

    def begin_push(self, version: int) -> None:
        """Starts the servers on the weights as they are now; the weights may change when it returns."""
        if self._pending is not None:
            wait([self._pending])  # servers may still read the file that is written next
        self._began = time.monotonic()
        summaries = self._transport.prepare()
        written = time.monotonic()
        if of_ranks := [iter(of_rank) for of_rank in self.ranks.to_0("write", summaries)]:
            summaries = [Summary(*next(of_ranks[piece.rank])) for piece in self.layout.pieces]
            names = (piece.tensor.name for piece in self.layout.pieces)
            self.fingerprint = fingerprint(zip(names, (summary.word_sum for summary in summaries), strict=True))
            self._digests = [summary.digest for summary in summaries]
        self._seconds = {"write": written - self._began, "ranks": time.monotonic() - written}
        self._version = version
        self._pending = self._deliver(version, self._live_servers())
        self._stall_s = time.monotonic() - self._began

    def finish_push(self) -> PushReport:
        """Waits until the servers hold the weights of the last `begin_push`. Raises as `push` does."""
        assert self._pending is not None
        assert self._version is not None
        began = time.monotonic()
        error = self._pending.exception()
        told = self._fanout and {
            "error": None if error is None else str(error) or repr(error),
            "servers_lost": isinstance(error, NoServerError),
            "seconds": self._seconds | self._fanout.seconds,
            "failed": self._fanout.failed,
            "total_s": 0.0 if error else self._pending.result() - self._began,
        }
        try:
            outcome = self.ranks.from_0("servers", told)
        except SyncError as unreachable:
            raise error or unreachable from None
        if error is not None:
            raise error
        if outcome["error"] is not None:
            raise (NoServerError if outcome["servers_lost"] else SyncError)(outcome["error"])
        return PushReport(
            version=self._version,
            num_bytes=self.layout.num_bytes,
            stall_s=self._stall_s + time.monotonic() - began,
            total_s=outcome["total_s"],
            began=self._began,
            seconds=outcome["seconds"],
            failed=outcome["failed"],
        )

    def bring_up(self, before: Callable[[], None] = lambda: None) -> list[str]:
        """Pushes the last version into servers that came since; returns the names of those that now hold it.

        `before` is called, on every rank, when there are some: it may bring the weights back, and cost other servers
        theirs. They must be those of the last push; had they changed, the digests would not agree and the servers
        refuse. Never raises for a server that fails: it stays left out.
        """
        if not self.ranks.from_0("late servers", bool(self._late())):
            return []
        before()
        late = self._late()
        assert self._version is not None
        try:
            self._deliver(self._version, late).result()
        except SyncError as error:
            warn(str(error))
        return [server.name for server in late if server.version == self._version and not server.unusable]

    def _late(self) -> list[Server]:
        return [s for s in self._live_servers() if s.version != self._version] if self._version is not None else []

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
        try:
            self.servers.poll()
        except ServerError as error:
            warn(str(error))
        return self.servers.alive()

    def _deliver(self, version: int, targets: list[Server]) -> Future[float]:
        """Runs the transport on a thread; returns once it reads no weight any more. The result is when it was done."""
        weights_free: Future[None] = Future()
        if self.servers is not None:  # not on the thread: what is asked from now on waits for the new weights
            self.servers.required_version, self.servers.pushing = version, True

        def run() -> float:
            try:
                free = partial(weights_free.set_result, None)
                push = Push(version=version, targets=targets, digests=self._digests, weights_free=free)
                self._transport.deliver(self._fanout, push)
                return time.monotonic()
            finally:
                if self.servers is not None:
                    self.servers.pushing = False

        delivered = self._background.submit(run)
        both: list[Future[Any]] = [delivered, weights_free]
        wait(both, return_when=FIRST_COMPLETED)
        return delivered


def serve_folder(servers: Servers) -> None:
    """Waits for the servers, from a process that does not train; those that may hold other weights than those of
    `model_dir` get these."""
    servers.wait_ready()
    if servers.read_model_dir:
        return
    if servers.cfg.transport == "auto" and servers.transport == "collective":
        servers.cfg = replace(servers.cfg, transport="tcp")  # NCCL wants a GPU for this process
    with WeightSync(folder_pieces(servers.model_dir), servers.cfg, servers) as sync:
        sync.push(sync.next_version())


def folder_pieces(model_dir: Path) -> list[Piece]:
    """Whole tensors of a Hugging Face folder, to push a folder into running servers from one process."""
    folder = HFFolder(model_dir)
    return [
        Piece(name=name, shape=info.shape, index=tuple(slice(0, n) for n in info.shape), view=folder.read(name))
        for name, info in folder.tensors.items()
    ]
