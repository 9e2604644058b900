"""The vLLM servers of a run: awaited, watched, brought back, asked for by the client and the weight sync.

The servers are unmodified vLLM processes behind a key; where they come from is a `sources.Source`: started here on
loopback, given by URL, or announced by `t1 serve` on other hosts.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import Literal

from megatron_t1.fields import FieldError
from megatron_t1.servers.config import RolloutConfig, Transport
from megatron_t1.servers.launch import begins_random, gpu_numbers
from megatron_t1.servers.server import ASLEEP, Server, ServerError, weights_in_words
from megatron_t1.servers.sources import LocalServers, all_on_this_host, source_of
from megatron_t1.warn import warn

_MIN_PATIENCE_S = 120.0
"""For the other servers, once one is there."""
_MAX_MISHAPS = 3
"""Times that one server is started again in one wait when something killed it, as a host short of memory would, or
disturbed its start."""


class Servers:
    """All servers of a run. `start` returns at once; `wait_ready` blocks until they are healthy; `close` ends them."""

    def __init__(
        self, cfg: RolloutConfig, model_dir: Path | str, run_dir: Path | str, *, trainer_gpus: int = 0
    ) -> None:
        """
        Args:
            trainer_gpus: the first GPUs of this host, which trainer ranks use.

        Raises:
            FieldError: servers started here would be on these GPUs too, and `share_gpus` is off.
        """
        self.cfg = cfg
        self.model_dir = Path(model_dir)
        self.run_dir = Path(run_dir)
        self.device = _device(cfg)
        self.all: list[Server] = []
        self.required_version: int | None = None
        """Version that a server must hold to be asked; None: the newest that any holds. Set by every weight push."""
        self.pushing = False
        """A weight push is under way: no server is usable until it ends, and whoever asks should wait."""
        self._source = source_of(cfg, self.model_dir, self.run_dir, self.device)
        if self.device == "cuda" and isinstance(self._source, LocalServers) and not cfg.share_gpus:
            _refuse_overlap(cfg, trainer_gpus)

    @property
    def transport(self) -> Transport:
        """How new weights will reach them (`push/transports.py`)."""
        if self.cfg.transport != "auto":
            return self.cfg.transport
        # Servers that somebody else started on this host may be on this process's GPU.
        if self.device == "cuda" and not self.cfg.share_gpus and not (self.cfg.urls and all_on_this_host(self.cfg)):
            return "collective"
        return "shm" if all_on_this_host(self.cfg) else "tcp"

    @property
    def read_model_dir(self) -> bool:
        """Whether the weights that they begin with are those of `model_dir`: others may hold any."""
        return isinstance(self._source, LocalServers) and not begins_random(self.cfg, self.model_dir)

    def start(self) -> Servers:
        """Starts the processes (or notes where they are) and returns without waiting for them."""
        self.all = self._source.open()
        return self

    def revive(self) -> list[Server]:
        """Starts the dead and unusable servers of this host anew, on the weights of `model_dir`, has `t1 serve` do so
        with its own, and looks at others again; returns these servers, not ready.

        None is asked for samples before a push has brought it to the current version.
        """
        revived = self._source.look(self.all)
        for server in self.all:
            # Of a process on another host nobody tells us that it ended: a push that failed may be the only sign.
            left_behind = server.ready and self.required_version not in (None, server.version)
            if left_behind and not server.exited() and not server.healthy():
                server.unusable = "it does not answer /health"
        lost = {index: server for index, server in enumerate(self.all) if server.exited() or server.unusable}
        self._source.end([*lost.values()])
        for index, server in lost.items():
            self.all[index] = self._source.again(index, server)
            revived.append(self.all[index])
        return revived

    def poll(self) -> None:
        """Marks the servers that have become healthy as ready, without waiting.

        Raises:
            ServerError: one refuses our key; the others have been looked at.
        """
        self._source.look(self.all)
        refused = None
        starting = [server for server in self.all if not server.ready and not server.exited()]
        with ThreadPoolExecutor(len(starting) or 1) as pool:  # of a host that is gone each takes all of its time
            healthy = list(pool.map(lambda server: server.healthy(timeout_s=2.0), starting))
        for server in compress(starting, healthy):
            try:
                server.introduce()
            except ServerError as error:
                refused = error
        if refused:
            raise refused
        if len(self.alive()) >= len(self.all):
            self._source.settled()

    def alive(self) -> list[Server]:
        """Servers that answered and have not been lost since, whatever weights they hold."""
        return [s for s in self.all if s.ready and s.unusable is None and not s.exited()]

    def only(self, server: Server) -> Servers:
        """A view on one of the servers, to ask it alone, whatever weights it holds."""
        view = copy.copy(self)
        view.all, view.required_version = [server], server.version
        return view

    def wait_ready(self, minimum: int | None = None) -> Servers:
        """Blocks until `minimum` servers are alive (None: all that the run begins with), `startup_timeout_s` at most.

        Of servers on other hosts, those that are there by then are enough, and the first that is there ends the wait
        soon: the others get as long as it took, `_MIN_PATIENCE_S` at least. Who comes later is used from then on.

        Raises:
            ServerError: too few, with the end of the log of one that is missing.
        """
        wanted = minimum or self._source.awaited
        began = announced = time.monotonic()
        deadline = began + self.cfg.startup_timeout_s
        some_alive = False
        mishaps: Counter[int] = Counter()
        while True:
            self.poll()
            if self.cfg.await_servers and self.alive() and not some_alive:
                some_alive = True
                took = time.monotonic() - began
                deadline = min(deadline, began + took + max(took, _MIN_PATIENCE_S))
            if len(self.alive()) >= wanted:
                break
            if not self.alive():
                self._source.servers_turn()  # nobody would come in the trainer's
            for index, server in enumerate(self.all):
                if (mishap := server.mishap()) and mishaps[index] < _MAX_MISHAPS:
                    mishaps[index] += 1
                    warn(f"server {server.name} {mishap} and is started again")
                    self._source.end([server])  # what is left of its group
                    self.all[index] = self._source.again(index, server)
            ended = [server for server in self.all if server.exited()]
            if ended and len(self.all) - len(ended) < wanted:
                raise ServerError(f"server {ended[0].name} ended while starting. Its log ends:\n{ended[0].log_tail()}")
            now = time.monotonic()
            if now > deadline:
                if self.cfg.await_servers and self.alive():
                    warn(f"{len(self.alive())} of {wanted} servers are there; going on")
                    break
                raise ServerError(self._describe_missing(wanted))
            if now - announced > 10:
                announced = now
                missing = ", ".join(s.name for s in self.all if not s.ready) or f"{wanted - len(self.alive())} servers"
                print(f"waiting for vLLM: {missing} ({now - began:.0f} s)", file=sys.stderr, flush=True)
            time.sleep(0.1)
        return self

    def usable(self) -> list[Server]:
        """Servers that may be asked for samples: alive, and on the weights that they should have."""
        alive = self.alive()
        required = self.required_version
        if required is None:
            required = max((server.version for server in alive), default=0)
        return [server for server in alive if server.version == required]

    def sleep(self) -> None:
        """Has them give their GPU memory back, weights included, also those that `t1 serve` is just starting; none is
        started until they get keys and values again. Which fails or can't be asked is ended: the room is needed."""
        # The other ranks wait for four times the second.
        self._source.trainers_turn(min(self.cfg.startup_timeout_s, 2 * self.cfg.sync_timeout_s))
        try:
            self.poll()
        except ServerError as error:
            warn(str(error))
        self._post("/sleep?level=2")
        for server in self.alive():
            server.version = ASLEEP

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Has them take memory again: for weights before a push, then for keys and values. One that is awake stays as
        it is."""
        if tag == "kv_cache":
            self._source.servers_turn()
        self._post(f"/wake_up?tags={tag}")

    def end(self, lost: list[Server]) -> None:
        """Ends them, where they were started here or by `t1 serve`, without waiting for what they are at."""
        self._source.end(lost)

    def _post(self, path: str) -> None:
        """To all that are alive, at once; then ends those that are not."""

        def post(server: Server) -> None:
            try:
                server.call("POST", path, timeout_s=self.cfg.sync_timeout_s)
            except ServerError as error:
                warn(f"server {server.name} is given up: {error}")
                server.unusable = str(error)

        with ThreadPoolExecutor(len(self.all) or 1) as pool:
            list(pool.map(post, self.alive()))
        alive = self.alive()
        self.end([server for server in self.all if server not in alive and not server.exited()])

    def describe_failures(self) -> str:
        """One paragraph for every server that is not usable, with the end of its log."""
        lines = []
        for server in self.all:
            if server.exited():
                lines.append(f"server {server.name} ended. Its log ends:\n{server.log_tail()}")
            elif server.unusable:
                lines.append(f"server {server.name} is unusable: {server.unusable}")
            elif self.required_version not in (None, server.version):
                held = weights_in_words(server.version)
                lines.append(f"server {server.name} holds {held}, not the current weights")
            elif not server.healthy():
                lines.append(f"server {server.name} does not answer /health. Its log ends:\n{server.log_tail()}")
        return "\n".join(lines) or "every server answers /health"

    def close(self) -> None:
        """Ends every process that was started here."""
        self._source.close(self.all)
        for server in self.all:
            server.ready = False

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe_missing(self, wanted: int) -> str:
        deadline = f"within {self.cfg.startup_timeout_s:g} s (rollout.startup_timeout_s)"
        late = next((server for server in self.all if not server.ready), None)
        if late is not None:
            return f"server {late.name} was not healthy {deadline}. Its log ends:\n{late.log_tail()}"
        folder = self.cfg.registry_folder(self.run_dir)
        return (
            f"{len(self.all)} of {wanted} awaited servers announced themselves in {folder} {deadline}: is `t1 serve "
            f"--rollout.host auto` running with run_dir {self.run_dir}? Its output says why not"
        )


@contextlib.contextmanager
def open_servers(cfg: RolloutConfig, model_dir: Path | str, run_dir: Path | str) -> Iterator[Servers]:
    """Servers started on `model_dir`, or those of other hosts as they are, healthy; ended when the block is left, where
    they were started here. Logs go to `run_dir`/logs."""
    with Servers(cfg, model_dir, run_dir) as servers:
        yield servers.start().wait_ready()


def _refuse_overlap(cfg: RolloutConfig, trainer_gpus: int) -> None:
    numbers = gpu_numbers(cfg)
    if shared := sorted(number for number in set(numbers) if number < trainer_gpus):
        raise FieldError(
            "rollout.gpu_ids",
            list(numbers),
            f"has GPUs {shared}, which the trainer's {trainer_gpus} ranks on this host use: give servers GPUs of their "
            "own (fewer ranks by parallel.nproc_per_node, the others by rollout.gpu_ids), or set rollout.share_gpus",
        )


def _device(cfg: RolloutConfig) -> str:
    if cfg.device != "auto":
        return cfg.device
    from megatron_t1.platform import gpus

    return "cuda" if gpus.usable() else "cpu"
