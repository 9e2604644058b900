"""How the bytes of a push travel: one class a transport, all behind the same two calls of `WeightSync`.

`prepare` runs on every rank and returns the digests of this rank's pieces; `deliver` brings the weights into the
servers through the `Fanout` that rank 0 holds.

| transport | bytes travel                                | proof before loading | trainer stalls     |
|-----------|---------------------------------------------|----------------------|--------------------|
| shm       | one file of the host, written by all ranks  | a digest per piece   | while it writes    |
| gloo      | TCP broadcast, one tensor after another     | a digest per piece   | until all answered |
| nccl      | vLLM's NCCL broadcast from rank 0's GPU     | none but vLLM's own  | until all answered |

shm works for CUDA servers on the trainer's host too, through host memory. `nccl` is thin on purpose, on vLLM's trainer
engine, and has not been run: there was no GPU where it was written. Left out: CUDA IPC, which vLLM carries over HTTP
as a pickle, and NCCL M2N, whose placements cannot express pipeline parallelism.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_t1.rollout.server import Server
from megatron_t1.rollout.vllm_plugin.wire import digest, digest_kind
from megatron_t1.weights.fanout import Fanout, SyncError
from megatron_t1.weights.shm import SharedFile, init_info, layout
from megatron_t1.weights.stream import Plan

Share = Callable[[str, Any], Any]
"""(phase, value on rank 0) -> rank 0's value, on every rank."""


class Transport(Protocol):
    background: bool
    """Whether only rank 0 takes part in `deliver`, so that it can run beside the training."""

    def prepare(self) -> list[str]: ...

    def deliver(self, fanout: Fanout | None, version: int, targets: list[Server], digests: list[str]) -> None: ...

    def close(self) -> None: ...


class ShmTransport:
    background = True

    def __init__(self, plan: Plan, share: Share) -> None:
        tensors, pieces, num_bytes = layout(plan)
        self._mine = plan.mine()
        self._tensors = {tensor.name: tensor for tensor in tensors}
        created = SharedFile(num_bytes) if plan.rank == 0 else None
        path = share("set-up", created.path if created else None)
        self.file = created or SharedFile(num_bytes, path)
        self._init_info = {"path": path, **init_info(tensors, pieces, num_bytes)}

    def prepare(self) -> list[str]:
        return list(self.file.write(self._mine, self._tensors))

    def deliver(self, fanout: Fanout | None, version: int, targets: list[Server], digests: list[str]) -> None:
        if fanout is None:
            return
        fanout.open(version, targets)
        fanout.init_weight_transfer_engine(self._init_info)
        fanout.start_weight_update()
        fanout.update_weights({"digests": digests})
        fanout.finish_weight_update()

    def close(self) -> None:
        self.file.close()


class GlooTransport:
    background = False

    def __init__(self, plan: Plan, share: Share, timeout_s: float) -> None:
        self._plan = plan
        self._share = share
        self._timeout_s = timeout_s
        self._init_info = init_info(*layout(plan))

    def prepare(self) -> list[str]:
        shapes = {tensor.name: tensor.shape for tensor in self._plan.tensors}
        return [digest(piece.view, digest_kind(piece.view, shapes[piece.name])) for piece in self._plan.mine()]

    def deliver(self, fanout: Fanout | None, version: int, targets: list[Server], digests: list[str]) -> None:
        if fanout is None:
            if self._share("start", None):
                for _ in self._plan.gather():
                    pass
            return
        try:
            fanout.open(version, targets)
            fanout.init_weight_transfer_engine(self._init_info)
            fanout.start_weight_update()
            world_size = 1 + fanout.count_workers()
        except BaseException:
            self._share("start", False)
            raise
        self._share("start", True)
        timeout = timedelta(seconds=self._timeout_s)
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        meeting = {
            "host": _address_towards(targets[0]),
            "port": store.port,
            "world_size": world_size,
            "timeout_s": self._timeout_s,
        }
        with ThreadPoolExecutor(1) as pool:
            update = pool.submit(fanout.update_weights, {"digests": digests, "meeting": meeting, "rank_offset": 1})
            broken = _broadcast(self._plan.gather(), store, world_size, timeout)
            if error := update.exception() or broken:
                raise error
        fanout.finish_weight_update()

    def close(self) -> None:
        pass


class NcclTransport:
    background = False

    def __init__(self, plan: Plan, share: Share) -> None:
        self._plan = plan
        self._share = share
        self._engine: Any = None
        self._members: list[Server] = []

    def prepare(self) -> list[str]:
        return []

    def deliver(self, fanout: Fanout | None, version: int, targets: list[Server], digests: list[str]) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        meeting = None
        if fanout is not None:
            try:
                fanout.open(version, targets)
                # The group of the first push stays, until a server joined or left.
                if self._engine is None or fanout.targets != self._members:
                    self._members = list(fanout.targets)
                    fanout.forget()
                    with socket.socket() as probe:
                        probe.bind(("", 0))
                        port = probe.getsockname()[1]
                    meeting = [_address_towards(targets[0]), port, 1 + fanout.count_workers()]
            except BaseException:
                self._share("start", False)
                raise
        meeting = self._share("start", meeting)
        if meeting is False:
            return
        if meeting is not None:
            if self._engine is not None:
                self._engine.shutdown()
            host, port, world_size = meeting
            self._engine = WeightTransferTrainerFactory.trainer_init(
                NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world_size, rank=self._plan.rank),
                client=fanout,  # type: ignore[arg-type]
                source=_nccl_source(self._plan),
            )
        self._engine.send_weights()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


def _nccl_source(plan: Plan) -> Any:
    """The plan as vLLM's WeightSource: whole tensors on rank 0's GPU, one after the other."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PlanSource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in plan.gather():
                yield name, tensor.cuda()

    return PlanSource()


def _broadcast(
    tensors: Iterator[tuple[str, torch.Tensor]], store: dist.TCPStore, world_size: int, timeout: timedelta
) -> SyncError | None:
    """Sends every tensor to all workers. After a failure the rest is only gathered: the other ranks are in step."""
    broken = None
    try:
        group = dist.ProcessGroupGloo(store, 0, world_size, timeout)
    except RuntimeError as error:
        broken = SyncError(f"the servers did not come to the meeting point within {timeout}: {error}")
    for name, tensor in tensors:
        if broken is None:
            try:
                group.broadcast(tensor.contiguous().view(-1).view(torch.uint8), 0).wait()
            except RuntimeError as error:
                broken = SyncError(f"phase update: tensor {name} did not reach every server: {error}")
    return broken


def _address_towards(server: Server) -> str:
    """This host's address as that server sees it."""
    parts = urlsplit(server.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])
