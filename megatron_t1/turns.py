"""Whose turn it is with the memory of GPUs that trainer and servers share.

    trainer: train, wake_for_push, push -> to_servers: generate -> to_trainer

Nobody takes memory before the other has given its own. Where neither gives any (`Config.takes_turns`), nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_t1.config import Config
from megatron_t1.engine.offload import Offload, free_cache
from megatron_t1.metrics import Stopwatch
from megatron_t1.push.ranks import Ranks
from megatron_t1.servers.servers import Servers


class Turns:
    """The trainer has the first. Every method is collective over its ranks; `servers` are rank 0's alone."""

    def __init__(self, cfg: Config, offload: Offload, ranks: Ranks, servers: Servers | None, watch: Stopwatch) -> None:
        self._taken, self._sleep = cfg.takes_turns, cfg.rollout.sleep
        self._offload, self._ranks, self._servers, self._watch = offload, ranks, servers, watch
        self._of_servers = False

    def to_servers(self) -> None:
        """After a push, or where they hold the weights already."""
        if self._of_servers or not self._taken:
            return
        with self._watch("turns"):
            self._offload.give()
            self._on_servers(lambda servers: servers.wake("kv_cache"))
        self._of_servers = True

    def to_trainer(self) -> None:
        """When nobody asks the servers. It costs those that sleep their weights."""
        if not self._of_servers:
            return
        with self._watch("turns"):
            self._on_servers(Servers.sleep)
            self._offload.take()
        self._of_servers = False

    def wake_for_push(self) -> None:
        """In the trainer's turn: the servers take memory for the weights alone."""
        if self._sleep:
            free_cache()
            self._on_servers(lambda servers: servers.wake("weights"))

    def _on_servers(self, call: Callable[[Servers], None]) -> None:
        """Of servers that sleep, when every rank is here; none goes on before it is done."""
        if self._sleep:
            self._ranks.to_0("turns", None)
            if self._servers:
                call(self._servers)
            self._ranks.from_0("turns", None)
