"""Where a run's servers come from: processes started here, URLs given by the user, or announcements of other hosts.

Each source opens the list that `Servers` works on (ports are chosen here), and brings a lost server back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.keys import KEY_FILE, REMOTE_KEY_ENV, read_key, shared_key
from megatron_t1.servers.launch import end_group, launch, public_address, reserve_port, signal_group
from megatron_t1.servers.registry import Entry, Orders, Registry
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.stop import STOP
from megatron_t1.warn import warn

_LOOK_INTERVAL_S = 0.2


class Source:
    """Where servers come from; as it stands, servers that somebody else starts and ends."""

    awaited: int
    """Servers that a run begins with."""

    def open(self) -> list[Server]:
        """The servers known so far, not yet ready."""
        return []

    def look(self, servers: list[Server]) -> list[Server]:
        """Adds servers that came up elsewhere, in place of those that they replace; returns them."""
        return []

    def again(self, index: int, lost: Server) -> Server:
        """The successor of a lost server that was ended (`end`), not ready; of one elsewhere, another look at it."""
        return Server(url=lost.url, key=lost.key, log_path=lost.log_path, distrusted=True)

    def settled(self) -> None:
        """All servers listen."""

    def end(self, lost: list[Server]) -> None:
        """Ends servers that can't be used any more, where somebody can; the room that they take is free then."""

    def trainers_turn(self, patience_s: float) -> None:
        """From now on nobody starts a server; returns when no start is under way."""

    def servers_turn(self) -> None:
        """Servers may start."""

    def close(self, servers: list[Server]) -> None:
        """Ends the processes that were started here."""


class LocalServers(Source):
    """vLLM processes of this host, ended by `close`."""

    def __init__(self, cfg: RolloutConfig, model_dir: Path, run_dir: Path, device: str) -> None:
        self._cfg, self._model_dir, self._run_dir, self._device = cfg, model_dir, run_dir, device
        self._host = public_address() if cfg.host == "auto" else cfg.host
        self._address = public_address() if cfg.host == "0.0.0.0" else self._host  # to be reached at
        self._key = ""
        self._reserved: list[socket.socket] = []
        self.awaited = cfg.num_servers

    def open(self) -> list[Server]:
        if not (self._model_dir / "config.json").is_file():
            raise ServerError(f"model folder {self._model_dir} has no config.json: nothing to serve")
        self._key = shared_key(Path(self._cfg.key_file or self._run_dir / KEY_FILE))
        servers: list[Server] = []
        try:
            for index, port in enumerate(self._cfg.ports or [0] * self._cfg.num_servers):
                servers.append(self._launch(index, self._reserve(port)))
        except BaseException:
            self.close(servers)
            raise
        return servers

    def again(self, index: int, lost: Server) -> Server:
        port = int(lost.url.rsplit(":", 1)[1])
        with contextlib.suppress(OSError):
            reserve_port(self._host, port).close()
            return self._launch(index, port)
        return self._launch(index, self._reserve(self._cfg.ports[index] if self._cfg.ports else 0))

    def settled(self) -> None:
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()

    def end(self, lost: list[Server]) -> None:
        for server in lost:
            assert server.process is not None
            end_group(server.process)

    def close(self, servers: list[Server]) -> None:
        """Ends every process, orderly first, then by force."""
        self.settled()
        processes = [server.process for server in servers if server.process is not None]
        for process in processes:
            signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + 5
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            end_group(process)

    def _launch(self, index: int, port: int) -> Server:
        name = f"server_{index}" if self._cfg.on_loopback else f"server_{socket.gethostname()}_{index}"
        log = self._run_dir / "logs" / f"{name}.log"
        process = launch(
            self._cfg,
            self._model_dir,
            index=index,
            host=self._host,
            port=port,
            key=self._key,
            device=self._device,
            log=log,
        )
        return Server(url=f"http://{self._address}:{port}", key=self._key, process=process, log_path=log)

    def _reserve(self, port: int) -> int:
        try:
            holder = reserve_port(self._host, port)
        except OSError as error:
            raise ServerError(
                f"rollout.ports: port {port} of {self._host} can't be taken ({error.strerror}): "
                "end what listens there, or leave rollout.ports empty to take free ones"
            ) from None
        self._reserved.append(holder)
        return int(holder.getsockname()[1])


class GivenServers(Source):
    """Running servers of `rollout.urls`."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self._cfg = cfg
        self.awaited = len(cfg.urls)

    def open(self) -> list[Server]:
        if self._cfg.key_file:
            key = read_key(Path(self._cfg.key_file))
        elif not (key := os.environ.get(REMOTE_KEY_ENV, "")):
            raise ServerError(f"rollout.urls needs the servers' key: set rollout.key_file or {REMOTE_KEY_ENV}")
        return [Server(url=url.rstrip("/"), key=key) for url in self._cfg.urls]


class AnnouncedServers(Source):
    """Servers that `t1 serve` starts, watches and starts again on other hosts; as many as announce themselves."""

    def __init__(self, cfg: RolloutConfig, run_dir: Path) -> None:
        self._registry = Registry(cfg.registry_folder(run_dir))
        self._key_path = Path(cfg.key_file) if cfg.key_file else run_dir / KEY_FILE
        self._known: dict[str, Entry] = {}
        self._orders = Orders()
        # What `t1 serve` takes to see an order while others of its servers hang. The other ranks wait meanwhile.
        self._patience_s = min(2 * cfg.health_timeout_s, cfg.sync_timeout_s / 2)
        self.awaited = cfg.await_servers

    def open(self) -> list[Server]:
        self._registry.order(self._orders)  # the turn of a trainer that was killed is over
        return []

    def look(self, servers: list[Server]) -> list[Server]:
        fresh = []
        for name, entry in self._registry.entries().items():
            before = self._known.get(name)
            if not entry.url or entry == before:
                continue
            server = Server(url=entry.url, key=read_key(self._key_path), log_path=Path(entry.log))
            replaced = next((i for i, old in enumerate(servers) if before and old.url == before.url), None)
            if replaced is None:
                servers.append(server)
            else:
                servers[replaced] = server
            self._known[name] = entry
            fresh.append(server)
        return fresh

    def end(self, lost: list[Server]) -> None:
        urls = {server.url for server in lost}
        self._give_up({entry.start for entry in self._known.values() if entry.url in urls})

    def trainers_turn(self, patience_s: float) -> None:
        """Starts that take longer, or are under way when the run is asked to stop, are given up."""
        self._order(trainers_turn=True)
        deadline = time.monotonic() + patience_s
        while (starts := self._starts_under_way()) and time.monotonic() < deadline and not STOP.asked:
            time.sleep(_LOOK_INTERVAL_S)
        self._give_up(starts)

    def servers_turn(self) -> None:
        self._order(trainers_turn=False)

    def close(self, servers: list[Server]) -> None:
        self._registry.order(None)

    def _starts_under_way(self) -> set[str]:
        """But those that were given up: nobody is left who would end them, and their files."""
        under_way = {entry.start for entry in self._registry.entries().values() if not entry.url}
        return under_way - {*self._orders.given_up}

    def _give_up(self, starts: set[str]) -> None:
        """Has them ended by their `t1 serve`, and waits for it; in vain only once."""
        if not (asked := starts - {*self._orders.given_up}):
            return
        self._order(given_up=(*self._orders.given_up, *asked))
        deadline = time.monotonic() + self._patience_s
        while left := [name for name, entry in self._registry.entries().items() if entry.start in asked]:
            if time.monotonic() > deadline:
                warn(f"servers {', '.join(left)} were not ended by their `t1 serve` within {self._patience_s:g} s")
                return
            time.sleep(_LOOK_INTERVAL_S)

    def _order(self, **changed: Any) -> None:
        orders = replace(self._orders, **changed)
        if orders != self._orders:
            self._registry.order(orders)
        self._orders = orders


def source_of(cfg: RolloutConfig, model_dir: Path, run_dir: Path, device: str) -> Source:
    if cfg.urls:
        return GivenServers(cfg)
    if cfg.await_servers:
        return AnnouncedServers(cfg, run_dir)
    return LocalServers(cfg, model_dir, run_dir, device)


def all_on_this_host(cfg: RolloutConfig) -> bool:
    """Whether every server is reached over loopback, so that memory can be shared with it."""
    hosts = [urlsplit(url).hostname or "" for url in cfg.urls] or [cfg.host]
    return not cfg.await_servers and all(host == "localhost" or host.startswith("127.") for host in hosts)
