"""How the bytes of a push travel: one class a transport, all behind the same two calls of `WeightSync`.

`prepare` runs on every rank and returns the summaries of this rank's pieces; `deliver` brings the weights into the
servers through the `Fanout` that rank 0 holds, and says when it reads the trainer's parameters no more.

| transport  | bytes travel                                  | a failure meanwhile leaves | the trainer stalls      |
|------------|-----------------------------------------------|----------------------------|-------------------------|
| shm        | one file of the host, written by all ranks    | the old weights            | while it writes         |
| tcp        | from each rank what it owns, to every host    | the old weights            | until they have arrived |
| collective | each rank broadcasts what it owns, in buckets | unknown weights            | until they are loaded   |

All prove every piece by a digest before the weights are in force, and all serve CUDA servers; `collective` alone does
so without a copy in the host's memory, over NCCL, which wants every member on a GPU of its own. What is not offered
stands in docs/weights.md.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch

from megatron_t1.push import collective
from megatron_t1.push.digests import Summary, summarize
from megatron_t1.push.fanout import Fanout
from megatron_t1.push.group import BROKE, Group, GroupError, Invitation, Meeting, import_nccl
from megatron_t1.push.layout import Layout
from megatron_t1.push.ranks import NoServerError, Ranks, SyncError
from megatron_t1.push.shm import SharedFile
from megatron_t1.push.tcp import PieceServer
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.launch import own_address
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers
from megatron_t1.weights.plan import Plan


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
    def prepare(self) -> list[Summary]: ...

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        """On every rank, on a thread beside the training; `ranks` must not be used after `push.weights_free`."""

    def close(self) -> None: ...


def open_transport(plan: Plan, layout: Layout, ranks: Ranks, cfg: RolloutConfig, servers: Servers | None) -> Transport:
    """The transport of the configuration, the same on all ranks.

    Raises:
        ValueError: shm was asked for, and the trainer's ranks are on several hosts.
    """
    name = ranks.from_0("set-up", servers and servers.transport)
    if name == "collective":
        return CollectiveTransport(plan, layout, ranks)
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

    def prepare(self) -> list[Summary]:
        return list(self.file.write(self._views))

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        push.weights_free()
        if fanout is not None:
            fanout.open(push.version, push.targets)
            fanout.introduce(self._init_info)
            fanout.receive({"digests": push.digests})
            fanout.load()
            fanout.finish()

    def close(self) -> None:
        self.file.close()


class TcpTransport:
    def __init__(self, plan: Plan, layout: Layout, ranks: Ranks) -> None:
        self._views = layout.views(plan)
        self._ranks = ranks
        self._init_info = {"timeout_s": ranks.timeout_s, "copy": secrets.token_hex(16), **layout.to_json()}

    def prepare(self) -> list[Summary]:
        return [summarize(*view) for view in self._views]

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        begun = None
        try:
            if fanout is not None:
                fanout.open(push.version, push.targets)
                fanout.introduce(self._init_info)
                begun = [secrets.token_urlsafe(32), [_host(server) for server in fanout.targets]]
        finally:
            begun = self._ranks.from_0("start", begun)
        if begun is None:
            return
        token, hosts = begun
        with PieceServer(self._views, _listen_at(self._ranks, hosts), token, self._ranks.timeout_s) as server:
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
            fanout.finish()

    def close(self) -> None:
        pass


class CollectiveTransport:
    """The group of one push stays for the next ones, until a member is lost or other servers are to be reached."""

    def __init__(self, plan: Plan, layout: Layout, ranks: Ranks) -> None:
        self._layout = layout
        self._views = layout.views(plan)
        self._ranks = ranks
        self._init_info = layout.to_json()
        # Of a meeting, and of a stream: a server can then say within its phase's deadline that they failed.
        self._timeout_s = ranks.timeout_s / 2
        self._group: Group | None = None
        if torch.cuda.is_available():
            import_nccl()  # now, while the servers start
        # On rank 0: how many workers of which servers were invited into the group, and with which token.
        self._workers: dict[Server, int] = {}
        self._token = ""

    def prepare(self) -> list[Summary]:
        return [summarize(*view) for view in self._views]

    def deliver(self, fanout: Fanout | None, push: Push) -> None:
        if fanout is not None:
            self._lead(fanout, push)
            return
        # Rank 0 says why it began no further attempt: in `WeightSync.finish_push`.
        while (call := self._ranks.from_0("start", None)) is not None:
            self._ranks.to_0("stream", self._take_part(call))
            if self._ranks.from_0("verdict", None):
                push.weights_free()
                return
            self.close()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _lead(self, fanout: Fanout, push: Push) -> None:
        """Rank 0: as many attempts as servers are lost in, each with a new group, and one more."""
        in_vain = 0
        try:
            fanout.open(push.version, push.targets)
            fanout.introduce(self._init_info)
            fanout.pause()
            while True:
                num_before = len(fanout.targets)
                faults = self._attempt(fanout, push)
                if not faults:
                    break
                in_vain += len(fanout.targets) == num_before
                if in_vain == 2:
                    fanout.lose_all("stream", "; ".join(faults), spoils=False)
        except SyncError as error:
            self.close()
            if fanout.targets and not isinstance(error, NoServerError):
                with contextlib.suppress(NoServerError):  # a rank was lost, and is what is to be said
                    fanout.lose_all("stream", str(error), spoils=False)
            with contextlib.suppress(SyncError):
                self._ranks.from_0("start", None)
            raise
        push.weights_free()
        fanout.finish()

    def _attempt(self, fanout: Fanout, push: Push) -> list[str]:
        """Rank 0: streams the weights into all servers at once; returns what broke the group, [] when nothing did."""
        fanout.start()
        arrived = False
        with contextlib.ExitStack() as stack:
            meeting, invitation = None, None
            if self._group is None or fanout.targets != list(self._workers):
                meeting, invitation = self._invite(fanout)
                stack.enter_context(meeting)
            self._ranks.from_0("start", {"invitation": invitation and asdict(invitation)})
            try:
                with ThreadPoolExecutor(1) as pool:
                    asked = pool.submit(self._ask, fanout, push, meeting, invitation)
                    fault = self._take_part({"invitation": invitation and asdict(invitation)})
                    if fault and meeting:
                        meeting.close()
                faults = [fault for fault in self._ranks.to_0("stream", fault) if fault]
                faults += self._drop_the_guilty(fanout, *asked.result())
                arrived = not faults
            finally:
                with contextlib.suppress(*[] if arrived else [SyncError]):
                    self._ranks.from_0("verdict", arrived)
        if faults:
            self.close()
        return faults

    def _invite(self, fanout: Fanout) -> tuple[Meeting, Invitation]:
        """Rank 0: opens the meeting of a new group."""
        self._workers = dict(zip(fanout.targets, fanout.num_workers(), strict=True))
        num_owners = len(self._layout.owners)
        size = num_owners + sum(self._workers.values())
        device = "cuda" if torch.cuda.is_available() and fanout.servers.device == "cuda" else "cpu"
        host = _listen_at(self._ranks, [_host(server) for server in fanout.targets])
        self._token = secrets.token_urlsafe(32)
        meeting = Meeting(host, self._token, self._timeout_s)
        return meeting, Invitation(*meeting.address, self._token, size, num_owners, device, self._timeout_s)

    def _ask(
        self, fanout: Fanout, push: Push, meeting: Meeting | None, invitation: Invitation | None
    ) -> tuple[str, dict[Server, ServerError]]:
        """Rank 0, beside its own broadcasts: the calls of the servers; their last phase, and its errors."""
        if meeting is not None and invitation is not None:
            first = dict(zip(self._workers, accumulate([invitation.num_owners, *self._workers.values()]), strict=False))

            def join(server: Server) -> None:
                info = {"step": "join", "invitation": asdict(invitation), "first_member": first[server]}
                try:
                    fanout.update(server, info)
                except ServerError:
                    meeting.close()  # the others need not wait for this one
                    raise

            if errors := fanout.attempt("meet", join):
                return "meet", errors
        fanout.mixed = True
        info = {"step": "stream", "digests": push.digests, "token": self._token}
        return "stream", fanout.attempt("stream", lambda server: fanout.update(server, info))

    def _take_part(self, call: dict[str, Any]) -> str | None:
        """This rank's own broadcasts, if it owns anything; returns what broke them."""
        owners = self._layout.owners
        if self._ranks.rank not in owners:
            return None
        try:
            if call["invitation"]:
                self.close()
                self._group = Group(Invitation(**call["invitation"]), owners.index(self._ranks.rank))
            assert self._group is not None
            collective.send(self._group, self._layout, self._views)
        except (GroupError, RuntimeError) as error:
            self.close()
            return f"trainer rank {self._ranks.rank}: {error}"
        return None

    def _drop_the_guilty(self, fanout: Fanout, phase: str, errors: dict[Server, ServerError]) -> list[str]:
        """Leaves out the servers that are gone or failed by themselves; returns what the others say."""
        innocent = {server: error for server, error in errors.items() if BROKE in str(error) and server.healthy()}
        fanout.drop(phase, {s: error for s, error in errors.items() if s not in innocent}, spoils=False)
        return [str(error) for error in (errors if phase == "meet" else innocent).values()]


def _listen_at(ranks: Ranks, server_hosts: list[str]) -> str:
    """Where a rank listens: the loopback address, unless servers or ranks are on other hosts."""
    others = list(server_hosts)
    if not ranks.on_one_host:
        others.append(os.environ["MASTER_ADDR"])
    addresses = [own_address(towards=host) for host in others]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def _host(server: Server) -> str:
    host = urlsplit(server.url).hostname
    if host is None:
        raise ValueError(f"server {server.url} has no host in its URL")
    return host
