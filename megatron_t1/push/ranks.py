"""What the trainer's ranks tell each other during a push: small JSON messages with a deadline, each from a named rank.

Point to point and not a collective, because a collective that times out can't say which rank was missing.
"""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Beyond the deadlines of rank 0's own calls to the servers, what the others wait for it to report a failure.
_GRACE_S = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one on every machine, and after every start of it."""


class SyncError(RuntimeError):
    """A push did not reach any server, or a trainer rank failed in it. Names server or rank, phase and tensor."""


class NoServerError(SyncError):
    """No server holds the pushed weights; the trainer is whole, and can push again once servers are back."""


class Ranks:
    """All trainer ranks. Every method is called on all of them, in the same order."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long a rank may take to come to where the others are."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.timeout_s = timeout_s
        # Rank 0 may be waiting for servers, and each phase of a push has this deadline.
        self._wait_for_0_s = 4 * timeout_s + _GRACE_S
        # A gloo group of its own: the training groups may be NCCL, and none of them has our deadline.
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=self._wait_for_0_s)) if self.size > 1 else None
        )
        hosts = self.to_0("set-up", [socket.gethostname(), _BOOT_ID.read_text()])
        self.on_one_host: bool = self.from_0("set-up", all(host == hosts[0] for host in hosts))

    def from_0(self, phase: str, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.rank != 0:
            return self._receive(0, phase, self._wait_for_0_s)
        for rank in range(1, self.size):
            self._send(rank, phase, value)
        return value

    def to_0(self, phase: str, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; [] elsewhere."""
        if self.rank != 0:
            self._send(0, phase, value)
            return []
        return [value, *(self._receive(rank, phase, self.timeout_s) for rank in range(1, self.size))]

    def _send(self, rank: int, phase: str, value: Any) -> None:
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            dist.send(torch.tensor([len(message)]), rank, group=self.group)
            dist.send(message, rank, group=self.group)
        except RuntimeError as error:
            raise SyncError(
                f"weight push, phase {phase}: rank {self.rank} could not reach trainer rank {rank}: {error}"
            ) from None

    def _receive(self, rank: int, phase: str, timeout_s: float) -> Any:
        timeout = timedelta(seconds=timeout_s)
        try:
            size = torch.zeros(1, dtype=torch.int64)
            dist.irecv(size, rank, group=self.group).wait(timeout)
            message = torch.empty(int(size), dtype=torch.uint8)
            dist.irecv(message, rank, group=self.group).wait(timeout)
        except RuntimeError as error:
            raise SyncError(
                f"weight push, phase {phase}: trainer rank {rank} ended or was silent for {timeout_s:g} s ({error})"
            ) from None
        return json.loads(message.numpy().tobytes())
