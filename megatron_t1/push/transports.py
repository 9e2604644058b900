"""How the bytes of a push travel: one class a transport, all behind the same two calls of `WeightSync`.

`prepare` runs on every rank and returns the digests of this rank's pieces; `deliver` brings the weights into the
servers through the `Fanout` that rank 0 holds, and says when it reads the trainer's parameters no more.

| transport | bytes travel                                    | proof before loading | the trainer stalls      |
|-----------|-------------------------------------------------|----------------------|-------------------------|
| shm       | one file of the host, written by all ranks      | a digest per piece   | while it writes         |
| tcp       | from each rank what it owns, to every worker    | a digest per piece   | until they have arrived |
| nccl      | vLLM's NCCL broadcast from rank 0's GPU         | none but vLLM's own  | until all answered      |

shm and tcp serve CUDA servers too, through host memory. `nccl` stands on vLLM's own trainer engine and has not been
run: it takes two GPUs; its messages are checked against vLLM's classes. Left out: CUDA IPC, which needs trainer and
server on the same GPU and travels over HTTP as a pickle; and NCCL M2N, whose placements can't express pipeline or
expert parallelism, and whose worker takes the ranks after the trainer's for one server's, so that it can't serve
several.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch

from megatron_t1.push.digests import digest, digest_kind
from megatron_t1.push.fanout import Fanout
from megatron_t1.push.layout import Layout
from megatron_t1.push.ranks import NoServerError, Ranks, SyncError
from megatron_t1.push.shm import SharedFile
from megatron_t1.push.tcp import PieceServer
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.launch import own_address, reserve_port
from megatron_t1.servers.server import Server
from megatron_t1.servers.servers import Servers
from megatron_t1.weights.plan import Plan

_NCCL_BUFFER_BYTES = 256 << 20
"""vLLM's 1 GiB costs rank 0 up to 10 GB and each worker 5 GB: two of them, and their parts put together."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What is brought, and to whom; on rank 0 complete, on the others without targets and digests."""

    version: int
    targets: list[Server]
    digests: list[str]
    """Of every piece of the plan, in its order."""
    weights_free: Callable[[], None]
    """To be called once this rank's parameters are read no more."""


class Transport(Protocol):
    def prepare(self) -> list[str]: ...

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        """On every rank, on a thread beside the training; `ranks` must not be used after `push.weights_free`."""

    def close(self) -> None: ...


def open_transport(plan: Plan, layout: Layout, ranks: Ranks, cfg: RolloutConfig, servers: Servers | None) -> Transport:
    """The transport of the configuration, the same on all ranks.

    Raises:
        ValueError: shm was asked for, and the trainer's ranks are on several hosts.
    """
    name = ranks.from_0("set-up", servers and servers.transport)
    if name == "nccl":
        return NcclTransport(plan, ranks)
    if name == "shm" and not ranks.on_one_host:
        if cfg.transport == "shm":
            raise ValueError("rollout.transport = shm must be tcp: the trainer's ranks are on several hosts")
        name = "tcp"
    return (ShmTransport if name == "shm" else TcpTransport)(plan, layout, ranks)


class ShmTransport:
    def __init__(self, plan: Plan, layout: Layout, ranks: Ranks) -> None:
        self._views = layout.views(plan)
        created = SharedFile(layout.num_bytes) if ranks.rank == 0 else None
        path = ranks.from_0("set-up", created.path if created else None)
        self.file = created or SharedFile(layout.num_bytes, path)
        self._init_info = {"path": path, **layout.to_json()}

    def prepare(self) -> list[str]:
        return list(self.file.write(self._views))

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        push.weights_free()
        if fanout is not None:
            fanout.open(push.version, push.targets)
            fanout.init_weight_transfer_engine(self._init_info)
            fanout.receive({"digests": push.digests})
            fanout.load()
            fanout.finish_weight_update()

    def close(self) -> None:
        self.file.close()


class TcpTransport:
    def __init__(self, plan: Plan, layout: Layout, ranks: Ranks) -> None:
        self._views = layout.views(plan)
        self._ranks = ranks
        self._init_info = {"timeout_s": ranks.timeout_s, **layout.to_json()}

    def prepare(self) -> list[str]:
        return [digest(view, digest_kind(view, piece.shape)) for view, piece in self._views]

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        begun = None
        try:
            if fanout is not None:
                fanout.open(push.version, push.targets)
                fanout.init_weight_transfer_engine(self._init_info)
                begun = [secrets.token_urlsafe(32), [_host(server) for server in fanout.targets]]
        finally:
            begun = self._ranks.from_0("start", begun)
        if begun is None:
            return
        token, hosts = begun
        with PieceServer(self._views, self._listen_at(hosts), token, self._ranks.timeout_s) as server:
            addresses = self._ranks.to_0("listen", server.address)
            try:
                if fanout is not None:
                    sources = [[rank, *address] for rank, address in enumerate(addresses)]
                    fanout.receive({"digests": push.digests, "sources": sources, "token": token})
            except NoServerError:
                with contextlib.suppress(SyncError):  # the servers' reason says more than a rank that is gone
                    self._ranks.from_0("sent", None)
                raise
            self._ranks.from_0("sent", None)
        push.weights_free()
        if fanout is not None:
            fanout.load()
            fanout.finish_weight_update()

    def close(self) -> None:
        pass

    def _listen_at(self, server_hosts: list[str]) -> str:
        """Where this rank listens: the loopback address, unless servers or ranks are on other hosts."""
        others = list(server_hosts)
        if not self._ranks.on_one_host:
            others.append(os.environ["MASTER_ADDR"])
        addresses = [own_address(towards=host) for host in others]
        return next((address for address in addresses if not address.startswith("127.")), addresses[0])


class NcclTransport:
    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self._plan = plan
        self._ranks = ranks
        self._engine: Any = None
        self._source: Any = None
        self._members: list[Server] = []

    def prepare(self) -> list[str]:
        if torch.cuda.is_available():
            # vLLM reads the parameters on streams that do not wait for the one that still writes the new ones.
            torch.cuda.synchronize()
        return []

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        meeting: Any = "failed"
        try:
            if fanout is not None:
                fanout.open(push.version, push.targets)
                fanout.pause()
                # The group of the first push stays, until a server joined or left.
                meeting = None if fanout.targets == self._members else self._new_meeting(fanout)
        finally:
            meeting = self._ranks.from_0("start", meeting)
        if meeting == "failed":
            return
        if meeting is not None and not self._meet(fanout, push, *meeting):
            return
        # NCCL itself waits for a dead worker without end; aborting the group lets the broadcast return.
        watchdog = threading.Timer(self._ranks.timeout_s, self.close)
        watchdog.start()
        try:
            self._source.items = None
            self._engine.send_weights()
        except Exception as error:
            self.close()
            lost_a_rank = isinstance(error, SyncError) and not isinstance(error, NoServerError)
            if fanout is not None and not lost_a_rank:
                self._source.drain()
                if fanout.targets:
                    fanout.lose_all("broadcast", error, spoils=True)
            if isinstance(error, SyncError):
                raise
            raise SyncError(f"push of version {push.version}, NCCL broadcast: {error!r}") from error
        finally:
            watchdog.cancel()

    def _meet(self, fanout: Fanout | None, push: Push, host: str, port: int, world_size: int) -> bool:
        """Makes a new group; False where rank 0 could not. A rank that went on alone would wait for ever for rank 0 to
        gather what it sends."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.close()
        info = NCCLTrainerInitInfo(
            master_address=host,
            master_port=port,
            world_size=world_size,
            rank=self._plan.rank,
            packed_buffer_size_bytes=_NCCL_BUFFER_BYTES,
        )
        failure = None
        try:
            self._source = _nccl_source(self._plan)
            self._engine = WeightTransferTrainerFactory.trainer_init(
                info,
                client=fanout,  # type: ignore[arg-type]
                source=self._source,
            )
            self._members = list(fanout.targets) if fanout is not None else []
        except Exception as error:  # of NCCL, of the store where its members meet, or of a server
            failure = error
        met: bool = self._ranks.from_0("meeting", failure is None)
        if failure is None:
            return met
        self.close()
        if isinstance(failure, SyncError):
            raise failure
        if fanout is not None:
            fanout.lose_all("meeting", failure, spoils=False)
        raise SyncError(f"push of version {push.version}, NCCL meeting: {failure!r}") from failure

    def close(self) -> None:
        self._members = []
        if self._engine is not None:
            self._engine.shutdown()

    def _new_meeting(self, fanout: Fanout) -> tuple[str, int, int]:
        """Rendezvous address and size of a new group: trainer rank 0 and every worker of every server."""
        fanout.forget()
        with reserve_port("", 0) as holder:
            port = holder.getsockname()[1]
        return own_address(towards=_host(fanout.targets[0])), port, 1 + fanout.count_workers()


def _nccl_source(plan: Plan) -> Any:
    """The plan as vLLM's WeightSource: whole tensors on rank 0's device, one after the other."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PlanSource(WeightSource):
        items: Iterator[tuple[str, torch.Tensor]] | None = None
        """What is left of the present push's iteration."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            self.items = self._gather()
            return self.items

        def _gather(self) -> Iterator[tuple[str, torch.Tensor]]:
            try:
                yield from plan.gather(device=torch.accelerator.current_accelerator() or "cpu")
            except RuntimeError as error:
                raise SyncError(f"weight push, NCCL: a trainer rank could not be reached: {error}") from error

        def drain(self) -> None:
            """Rank 0: takes what the other ranks still send, so that a push without servers ends for them too."""
            for _ in self.items or iter(self):
                pass

    return PlanSource()


def _host(server: Server) -> str:
    host = urlsplit(server.url).hostname
    if host is None:
        raise ValueError(f"server {server.url} has no host in its URL")
    return host
