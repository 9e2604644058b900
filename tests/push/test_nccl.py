"""What the NCCL transport tells vLLM, held to vLLM's own classes. No GPU: the communicator alone is a stand-in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_t1.push.ranks import NoServerError
from megatron_t1.push.sync import WeightSync
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers
from tests.push import reference


def vllms_engine() -> Any:
    """Its module; not imported before a test runs, because that takes as long as all other imports together."""
    from vllm.distributed.weight_transfer import nccl_engine

    return nccl_engine


@dataclass(eq=False)
class RecordingServer(Server):
    """Parses what it is sent as the worker does; `workers` of tensor parallelism."""

    workers: int = 1
    init: Any = None
    update: Any = None
    paths: list[str] = field(default_factory=list)
    dies_in_update: bool = False

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        self.paths.append(path.partition("?")[0])
        if path == "/get_world_size":
            return {"world_size": self.workers}
        if path == "/init_weight_transfer_engine":
            self.init = vllms_engine().NCCLWeightTransferInitInfo(**body["init_info"])
        if path == "/update_weights":
            if self.dies_in_update:
                raise ServerError(f"server {self.name}: connection reset")
            self.update = vllms_engine().NCCLWeightTransferUpdateInfo(**body["update_info"])
        if path == "/finish_weight_update":
            self.version_in_force = body["weight_version"]
        return {"success": True, "weight_version": getattr(self, "version_in_force", "default")}


class Communicator:
    """PyNcclCommunicator's two methods that are used; with `peer_lost` a broadcast returns only once it is aborted."""

    def __init__(self, peer_lost: bool) -> None:
        self.sent: list[torch.Tensor] = []
        self.aborted = threading.Event()
        self.peer_lost = peer_lost

    def send(self, tensor: torch.Tensor) -> None:
        if self.peer_lost:
            assert self.aborted.wait(60)
        self.sent.append(tensor.clone())

    def destroy(self) -> None:
        self.aborted.set()


@pytest.fixture
def servers() -> Servers:
    servers = Servers(RolloutConfig(transport="nccl", device="cuda", sync_timeout_s=20), "", "")
    servers.all = [
        RecordingServer(url=f"http://127.0.0.1:{port}", key="", ready=True, workers=workers)
        for port, workers in ((1, 2), (2, 4))
    ]
    return servers


def communicators(monkeypatch: pytest.MonkeyPatch, peer_lost: bool = False) -> list[tuple[Any, Communicator]]:
    """Those that get opened, with the info that they were opened with; vLLM packs on CUDA streams, here one by one."""
    opened: list[tuple[Any, Communicator]] = []

    def open_endpoint(info: Any) -> Communicator:
        opened.append((info, Communicator(peer_lost)))
        return opened[-1][1]

    def broadcast(iterator: Any, group: Communicator, src: int, post_iter_func: Any, **buffers: int) -> None:
        for item in iterator:
            group.send(post_iter_func(item))

    monkeypatch.setattr(vllms_engine(), "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(vllms_engine(), "packed_nccl_broadcast_producer", broadcast)
    return opened


TENSORS = {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4).bfloat16()}


def test_a_push_is_what_vllms_worker_expects(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = communicators(monkeypatch)
    with WeightSync(reference.whole(TENSORS), servers.cfg, servers) as sync:
        assert sync.push(7).failed == {}
        assert sync.push(8).failed == {}
        ((info, communicator),) = opened  # one group for both pushes
        assert (info.world_size, info.rank) == (7, 0)
        assert [server.init.rank_offset for server in servers.all] == [1, 3]
        for server in servers.all:
            assert (server.init.master_address, server.init.master_port) == (info.master_address, info.master_port)
            assert (server.init.world_size, server.init.packed) == (7, info.packed)
            assert server.update.names == list(TENSORS)
            assert [getattr(torch, name) for name in server.update.dtype_names] == [t.dtype for t in TENSORS.values()]
            assert server.update.shapes == [list(t.shape) for t in TENSORS.values()]
            assert server.version == 8
            push = server.paths[-7:]
            assert push == [
                *("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"),
                *("/reset_prefix_cache", "/weight_info", "/resume"),
            ]
        for sent, tensor in zip(communicator.sent, [*TENSORS.values()] * 2, strict=True):
            assert torch.equal(sent, tensor)


def test_a_server_that_joins_makes_a_new_group(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = communicators(monkeypatch)
    late = servers.all.pop()
    with WeightSync(reference.whole(TENSORS), servers.cfg, servers) as sync:
        sync.push(1)
        servers.all.append(late)
        sync.push(2)
    assert [info.world_size for info, _ in opened] == [3, 7]
    assert opened[0][1].aborted.is_set()
    assert [server.version for server in servers.all] == [2, 2]


def test_a_lost_worker_ends_the_push_at_the_deadline(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL alone would wait for ever."""
    opened = communicators(monkeypatch, peer_lost=True)
    cfg = RolloutConfig(transport="nccl", device="cuda", sync_timeout_s=0.5)
    servers.cfg = cfg
    servers.all[1].dies_in_update = True
    with WeightSync(reference.whole(TENSORS), cfg, servers) as sync:
        report = sync.push(3)
    assert list(report.failed) == [servers.all[1].name]
    assert "unknown weights" in servers.all[1].unusable
    assert opened[0][1].aborted.is_set()


def test_a_broadcast_that_fails_loses_the_servers_and_not_the_trainer(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    communicators(monkeypatch)
    gathered: list[str] = []

    def fails(iterator: Any, **arguments: Any) -> None:
        next(iterator)
        raise RuntimeError("NCCL error: remote process exited")

    monkeypatch.setattr(vllms_engine(), "packed_nccl_broadcast_producer", fails)
    with WeightSync(reference.whole(TENSORS), servers.cfg, servers) as sync:
        gather = sync.plan.gather

        def counted(**arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for item in gather(**arguments):
                gathered.append(item[0])
                yield item

        monkeypatch.setattr(sync.plan, "gather", counted)
        with pytest.raises(NoServerError, match=r"push of version 3, phase broadcast: .*remote process exited"):
            sync.push(3)
    assert gathered == list(TENSORS), "other ranks would wait for rank 0 to take what they send"
    assert all("unknown weights" in server.unusable for server in servers.all)


def test_servers_that_do_not_come_to_the_meeting_are_asked_again(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = communicators(monkeypatch)
    meet = vllms_engine().open_trainer_endpoint

    def late(info: Any) -> Communicator:
        raise TimeoutError("1 of 7 members came within 300 s")

    with WeightSync(reference.whole(TENSORS), servers.cfg, servers) as sync:
        monkeypatch.setattr(vllms_engine(), "open_trainer_endpoint", late)
        with pytest.raises(NoServerError, match=r"version 4, phase meeting: .*1 of 7 members .*keeps version 0"):
            sync.push(4)
        assert [server.paths[-1] for server in servers.all] == ["/resume"] * 2
        monkeypatch.setattr(vllms_engine(), "open_trainer_endpoint", meet)
        assert sync.bring_up() == [server.name for server in servers.all]
    assert len(opened) == 1
    assert [server.version for server in servers.all] == [4, 4]
