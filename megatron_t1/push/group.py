"""A process group of trainer ranks and server workers, beside torch's own: gloo through the host, NCCL on CUDA.

torch's default group is the trainer's in the one process and vLLM's in the other, so this one has a store of its own:
its members leave their addresses at a `Meeting`, which wants the push's token first, listens where `tcp` does and holds
bytes that nobody unpickles. Every wait has a deadline, after which, or once any member is gone, the group is broken: it
is closed, and whoever is left makes a new one. Left out: encryption, as in `tcp`; and the connections that gloo and
NCCL make among members then know no token, so that the network has to be a trusted one.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_t1.push.tcp import TokenServer

BROKE = "the group of the push broke"
"""How the message of every GroupError begins: what a server says whose own fault it was not."""
BUCKET_BYTES = 64 << 20
_MAX_LINE = 1 << 16

Wait = Callable[[], None]


class GroupError(ConnectionError):
    """A member is gone, or the deadline is over. The group is of no use any more."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"{BROKE}: {reason}")


@dataclass(frozen=True)
class Invitation:
    """What a member must know to join; as JSON among the ranks and to the servers."""

    host: str
    port: int
    token: str
    size: int
    """Members: the trainer ranks that own pieces, then the workers of every server in turn."""
    num_owners: int
    device: str
    """`cuda`: NCCL, every member on a GPU of its own; `cpu`: gloo."""
    timeout_s: float
    """For the meeting, and again for each use of the group."""
    bucket_bytes: int = BUCKET_BYTES
    """Most that is under way at once; each member holds two such buffers."""


class Meeting(TokenServer):
    """The table in which the members of one group leave their addresses."""

    def __init__(self, host: str, token: str, timeout_s: float) -> None:
        self._table: dict[str, str] = {}
        self._changed = threading.Condition()
        self._is_over = False
        super().__init__(host, token, timeout_s)

    def close(self) -> None:
        """Whoever waits for another member's address hears that it will not come."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        super().close()

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rw") as lines:
            while line := lines.readline(_MAX_LINE):
                key, value = json.loads(line)
                with self._changed:
                    if value is not None:
                        self._table[key] = value
                        self._changed.notify_all()
                    self._changed.wait_for(partial(self._has, key), self._timeout_s)
                    found = self._table.get(key)
                if found is None:
                    return
                lines.write(json.dumps(found) + "\n")
                lines.flush()

    def _has(self, key: str) -> bool:
        return self._is_over or key in self._table


class _Store(dist.Store):  # type: ignore[misc]
    """A member's end of the meeting, as torch wants it."""

    def __init__(self, invitation: Invitation) -> None:
        super().__init__()
        self._socket = socket.create_connection((invitation.host, invitation.port), invitation.timeout_s)
        self._socket.sendall(invitation.token.encode())
        self._lines = self._socket.makefile("rw")

    @property
    def own_host(self) -> str:
        """The address by which this member reaches the meeting, and the others can reach it."""
        return str(self._socket.getsockname()[0])

    def set(self, key: str, value: bytes | str) -> None:
        self._ask(key, (value.encode() if isinstance(value, str) else bytes(value)).hex())

    def get(self, key: str) -> bytes:
        return bytes.fromhex(self._ask(key, None))

    def wait(self, keys: Iterable[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _ask(self, key: str, value: str | None) -> str:
        self._lines.write(json.dumps([key, value]) + "\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the meeting was closed before all members had come")
        return str(json.loads(line))


class Group:
    """One member's end; made by all members at once.

    Raises:
        GroupError: not all of them came.
    """

    def __init__(self, invitation: Invitation, rank: int) -> None:
        self.rank = rank
        self.token = invitation.token
        self.device = torch.device(invitation.device)
        self.bucket_bytes = invitation.bucket_bytes
        self._timeout_s = invitation.timeout_s
        try:
            store = _Store(invitation)
            try:
                make = _Gloo if self.device.type == "cpu" else _Nccl
                self._members: _Gloo | _Nccl | None = make(store, rank, invitation)
            finally:
                store.close()
        except (OSError, RuntimeError) as error:
            raise GroupError(f"{type(error).__name__}: {error}") from None
        self.begin()

    def begin(self) -> None:
        """From here on the next broadcasts have their `timeout_s` together."""
        self._deadline = time.monotonic() + self._timeout_s

    def broadcast(self, data: torch.Tensor, root: int) -> Wait:
        """Begins to bring the bytes (uint8, contiguous) of member `root` to all workers; the result waits for them.
        What a trainer rank that is not the root then finds in `data` is undefined.

        Both raise GroupError.
        """
        try:
            wait = self._started(data, root)
        except RuntimeError as error:
            raise GroupError(error) from None

        def finish() -> None:
            try:
                wait()
            except RuntimeError as error:
                raise GroupError(error) from None

        return finish

    def close(self) -> None:
        """The other members' broadcasts break."""
        members, self._members = self._members, None
        if members is not None:
            members.close()

    def _started(self, data: torch.Tensor, root: int) -> Wait:
        if self._members is None:
            raise RuntimeError("it was closed")
        return self._members.broadcast(data, root, self._deadline)


class _Gloo:
    """Sends to the workers alone: a broadcast would bring everything to the other trainer ranks too."""

    def __init__(self, store: _Store, rank: int, invitation: Invitation) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=store.own_host)]
        options._timeout = timedelta(seconds=invitation.timeout_s)
        self._group: Any = dist.ProcessGroupGloo(store, rank, invitation.size, options)
        self._rank = rank
        self._workers = range(invitation.num_owners, invitation.size)
        # Here and nowhere else, so that `close` ends them: a transfer that is under way keeps its connections open.
        self._works: dict[int, list[Any]] = {}
        self._count = 0

    def broadcast(self, data: torch.Tensor, root: int, deadline: float) -> Wait:
        number, self._count = self._count, self._count + 1
        self._works[number] = []
        if self._rank == root:
            self._works[number] = [self._group.send([data], worker, number) for worker in self._workers]
        elif self._rank in self._workers:
            self._works[number] = [self._group.recv([data], root, number)]

        def wait() -> None:
            if number not in self._works:
                raise RuntimeError("it was closed")
            while self._works[number]:
                self._works[number][-1].wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
                self._works[number].pop()
            del self._works[number]

        return wait

    def close(self) -> None:
        self._group = None
        self._works.clear()


def import_nccl() -> None:
    """vLLM's wrapper of it: seconds, and from a network file system half a minute."""
    import vllm.distributed.device_communicators.pynccl  # noqa: F401


class _Nccl:
    """By vLLM's wrapper: torch's own ends the process when a member is lost."""

    def __init__(self, store: _Store, rank: int, invitation: Invitation) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.utils.nccl import unpinned_nccl_env

        if rank == 0:
            store.set("nccl", bytes(NCCLLibrary().ncclGetUniqueId().internal))
        unique_id = store.get("nccl")
        device = torch.device("cuda", torch.cuda.current_device())
        made: list[Any] = []
        failed: list[BaseException] = []

        def meet() -> None:
            try:
                with torch.cuda.device(device), unpinned_nccl_env():
                    communicator = PyNcclCommunicator.from_unique_id_bytes(unique_id, rank, invitation.size, device)
                    # The first broadcast connects the members, and waits for each of them without a deadline.
                    communicator.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), 0)
                    torch.cuda.synchronize()
                    made.append(communicator)
            except Exception as error:
                failed.append(error)

        # NCCL waits without end for a member that died after it had come to the meeting.
        thread = threading.Thread(target=meet, name="nccl", daemon=True)
        thread.start()
        thread.join(invitation.timeout_s)
        if not made:
            reason = failed[0] if failed else f"not all members came within {invitation.timeout_s:g} s"
            raise RuntimeError(f"NCCL: {reason} (without NCCL: rollout.transport = tcp)")
        self._communicator = made[0]
        # Of its own: who waits for what it does with one window would wait for the next, and that without a deadline.
        self._stream = torch.cuda.Stream(device)

    def broadcast(self, data: torch.Tensor, root: int, deadline: float) -> Wait:
        self._stream.wait_stream(torch.cuda.current_stream())
        data.record_stream(self._stream)
        self._communicator.broadcast(data, root, stream=self._stream)
        arrived = torch.cuda.Event()
        arrived.record(self._stream)

        def wait() -> None:
            while not arrived.query():
                if time.monotonic() > deadline:
                    raise RuntimeError("NCCL: a member is gone or too slow")
                time.sleep(0.0005)

        return wait

    def close(self) -> None:
        self._communicator.destroy()  # aborts: what is under way on the GPU ends
