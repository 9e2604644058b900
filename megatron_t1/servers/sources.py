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
from pathlib import Path
from urllib.parse import urlsplit

from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.keys import KEY_FILE, REMOTE_KEY_ENV, new_key, read_key, shared_key
from megatron_t1.servers.launch import end_group, launch, public_address, reserve_port, signal_group
from megatron_t1.servers.registry import Entry, Registry
from megatron_t1.servers.server import Server, ServerError


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
        """The successor of a lost server, not ready; of one elsewhere, another look at it."""
        return Server(url=lost.url, key=lost.key, log_path=lost.log_path)

    def settled(self) -> None:
        """All servers listen."""

    def await_restarts(self, timeout_s: float) -> None:
        """Waits until the restarts that somebody else has begun are over, well or not."""

    def close(self, servers: list[Server]) -> None:
        """Ends the processes that were started here."""


class LocalServers(Source):
    """vLLM processes of this host, ended by `close`."""

    def __init__(self, cfg: RolloutConfig, model_dir: Path, run_dir: Path, device: str) -> None:
        self._cfg, self._model_dir, self._run_dir, self._device = cfg, model_dir, run_dir, device
        self._host = public_address() if cfg.host == "auto" else cfg.host
        self._key = ""
        self._reserved: list[socket.socket] = []
        self.awaited = cfg.num_servers

    def open(self) -> list[Server]:
        if not (self._model_dir / "config.json").is_file():
            raise ServerError(f"model folder {self._model_dir} has no config.json: nothing to serve")
        if self._cfg.key_file:
            self._key = shared_key(Path(self._cfg.key_file))
        else:
            make = new_key if self._cfg.on_loopback else shared_key
            self._key = make(self._run_dir / KEY_FILE)
        servers: list[Server] = []
        try:
            for index, port in enumerate(self._cfg.ports or [0] * self._cfg.num_servers):
                servers.append(self._launch(index, self._reserve(port)))
        except BaseException:
            self.close(servers)
            raise
        return servers

    def again(self, index: int, lost: Server) -> Server:
        assert lost.process is not None
        end_group(lost.process)
        port = int(lost.url.rsplit(":", 1)[1])
        with contextlib.suppress(OSError):
            reserve_port(self._host, port).close()
            return self._launch(index, port)
        return self._launch(index, self._reserve(self._cfg.ports[index] if self._cfg.ports else 0))

    def settled(self) -> None:
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()

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
        return Server(url=f"http://{self._host}:{port}", key=self._key, process=process, log_path=log)

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
        self._in_vain: set[str] = set()
        """Restarts that were waited for and did not end: somebody who was killed left their files."""
        self.awaited = cfg.await_servers

    def look(self, servers: list[Server]) -> list[Server]:
        fresh = []
        for name, entry in self._registry.entries().items():
            before = self._known.get(name)
            if entry == before:
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

    def await_restarts(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        under_way = self._registry.restarts() - self._in_vain
        while under_way & self._registry.restarts():
            if time.monotonic() > deadline:
                self._in_vain |= under_way
                return
            time.sleep(0.2)


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
