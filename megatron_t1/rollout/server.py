"""Starting, watching and ending the vLLM servers of a run, or joining running ones by URL.

The servers are unmodified vLLM processes, each in a session of its own, bound to 127.0.0.1, with every route but
/health and /metrics behind a key made for the run. Left out: placing servers on other hosts. Start them there with
`t1 serve` (or Slurm) and give their URLs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_t1.rollout.config import RolloutConfig, Transport
from megatron_t1.rollout.launch import HOST, end_group, launch, reserve_port, signal_group

_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 65536
_ERROR_LINE = re.compile(r"\b[A-Z]\w*(Error|Exception): ")
REMOTE_KEY_ENV = "T1_SERVER_KEY"
KEY_FILE = "server_key"


class ServerError(RuntimeError):
    """A server did not come up, died, answered nonsense or not in time. The message names it and says what to do."""


@dataclass(eq=False)
class Server:
    """One vLLM server. `version` and `unusable` decide whether it may be asked for samples."""

    url: str
    key: str = field(repr=False)
    process: subprocess.Popen[bytes] | None = None
    """The group's leader when this process started it; None for a server given by URL."""
    log_path: Path | None = None
    version: int = 0
    """Weight version it holds, as far as we know; 0: the weights it started with."""
    max_model_len: int = 0
    """Longest prompt + response, tokens; known once it is ready."""
    unusable: str | None = None
    """Why no samples may be asked of it any more: a failed push left unknown weights. None: fine."""
    ready: bool = False
    """It answered /health once."""

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def exited(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def log_tail(self) -> str:
        """The errors in its log and its last lines, indented, or a line that says where its log is."""
        if self.log_path is None or not self.log_path.exists():
            return "    (its log is where it was started)"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        # The root cause stands far above the end: the API server prints its own traceback after the engine's.
        early = [line for line in lines[:-_LOG_TAIL_LINES] if _ERROR_LINE.search(line)][:5]
        shown = [*early, "[...]", *lines[-_LOG_TAIL_LINES:]] if early else lines[-_LOG_TAIL_LINES:]
        return "\n".join(f"    {line}" for line in shown) + f"\n    (whole log: {self.log_path})"

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        """One blocking call; returns the decoded JSON (None for an empty body).

        Raises ServerError on a refused, late or broken answer, with the server's own message.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=dict(self.headers))
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with _OPENER.open(request, timeout=timeout_s) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            text = error.read(4000).decode(errors="replace")
            raise ServerError(f"server {self.name}: {path} answered {error.code}: {text.strip()}") from None
        except TimeoutError:
            raise ServerError(f"server {self.name}: {path} did not answer within {timeout_s:g} s") from None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ServerError(f"server {self.name}: {path} did not answer within {timeout_s:g} s") from None
            raise ServerError(f"server {self.name}: {path}: {reason}\n{self.log_tail()}") from None
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            raise ServerError(f"server {self.name}: {path} answered no JSON: {raw[:200]!r}") from None

    def healthy(self, timeout_s: float = 5.0) -> bool:
        try:
            with _OPENER.open(self.url + "/health", timeout=timeout_s) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def hangs(self, timeout_s: float) -> bool:
        """Whether it takes connections but answers nothing: stopped or stuck, not ended."""
        try:
            _OPENER.open(self.url + "/health", timeout=timeout_s).close()
        except TimeoutError:
            return True
        except (urllib.error.URLError, OSError) as error:
            return isinstance(getattr(error, "reason", None), TimeoutError)
        return False

    def introduce(self) -> None:
        """Learns what it serves, once it is healthy; raises ServerError when the key is wrong."""
        models = self.call("GET", "/v1/models", timeout_s=30)
        self.max_model_len = int(models["data"][0]["max_model_len"])
        self.version = parse_version(self.call("GET", "/weight_info", timeout_s=30)["weight_version"])
        self.ready = True


def parse_version(text: str) -> int:
    """vLLM's weight version as a number; `default` is what a server starts with."""
    return 0 if text == "default" else int(text)


# Servers are on this host or named by the user: a proxy of the environment must not see their traffic.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Servers:
    """All servers of a run. `start` returns at once; `wait_ready` blocks until all are healthy; `close` ends them."""

    def __init__(self, cfg: RolloutConfig, model_dir: Path | str, run_dir: Path | str) -> None:
        self.cfg = cfg
        self.model_dir = Path(model_dir)
        self.run_dir = Path(run_dir)
        self.device = _device(cfg)
        self.all: list[Server] = []
        self.required_version: int | None = None
        """Version that a server must hold to be asked; None: the newest that any holds. Set by every weight push."""
        self.pushing = False
        """A weight push is under way: no server is usable until it ends, and whoever asks should wait."""
        self._reserved: list[socket.socket] = []

    @property
    def transport(self) -> Transport:
        if self.cfg.transport != "auto":
            return self.cfg.transport
        return "nccl" if self.device == "cuda" else "shm"

    def start(self) -> Servers:
        """Starts the processes (or notes the given URLs) and returns without waiting for them."""
        if self.cfg.urls:
            key = _given_key(self.cfg)
            self.all = [Server(url=url.rstrip("/"), key=key) for url in self.cfg.urls]
            return self
        if not (self.model_dir / "config.json").is_file():
            raise ServerError(f"model folder {self.model_dir} has no config.json: nothing to serve")
        key = secrets.token_urlsafe(32)
        self._write_key(key)
        try:
            for index, port in enumerate(self.cfg.ports or [0] * self.cfg.num_servers):
                self.all.append(self._launch(index, self._reserve_port(port), key))
        except BaseException:
            self.close()
            raise
        return self

    def revive(self) -> list[Server]:
        """Starts the dead and unusable servers anew, on the weights of `model_dir`; returns them at once, not ready.

        Servers given by URL are only looked at again. None is asked for samples before `WeightSync` has brought it to
        the current version.
        """
        revived = []
        for index, server in enumerate(self.all):
            if server.exited() or server.unusable:
                if server.process is None:
                    self.all[index] = Server(url=server.url, key=server.key)
                else:
                    end_group(server.process)
                    self.all[index] = self._launch(index, int(server.url.rsplit(":", 1)[1]), server.key)
                revived.append(self.all[index])
        return revived

    def poll(self) -> None:
        """Marks the servers that have become healthy as ready, without waiting."""
        for server in self.all:
            if not server.ready and not server.exited() and server.healthy(timeout_s=2.0):
                server.introduce()

    def wait_ready(self, timeout_s: float | None = None) -> Servers:
        """Blocks until every server is healthy; raises ServerError with the end of the log of one that is not."""
        timeout_s = timeout_s or self.cfg.startup_timeout_s
        began = announced = time.monotonic()
        while waiting := [server for server in self.all if not server.ready]:
            self.poll()
            late = waiting[0]
            if late.exited():
                raise ServerError(f"server {late.name} ended while starting. Its log ends:\n{late.log_tail()}")
            now = time.monotonic()
            if now - began > timeout_s and not late.ready:
                raise ServerError(
                    f"server {late.name} was not healthy within {timeout_s:g} s (rollout.startup_timeout_s). "
                    f"Its log ends:\n{late.log_tail()}"
                )
            if now - announced > 10:
                announced = now
                print(f"waiting for vLLM: {late.name} ({now - began:.0f} s)", file=sys.stderr, flush=True)
            time.sleep(0.1)
        for holder in self._reserved:
            holder.close()
        return self

    def watch(self) -> None:
        """Blocks while all servers live (`t1 serve`); raises ServerError with the end of the log of one that ended."""
        while not any(server.exited() for server in self.all):
            time.sleep(0.5)
        raise ServerError(self.describe_failures())

    def usable(self) -> list[Server]:
        """Servers that may be asked for samples: ready, not ended, and on the weights that they should have."""
        alive = [s for s in self.all if s.ready and s.unusable is None and not s.exited()]
        required = self.required_version
        if required is None:
            required = max((server.version for server in alive), default=0)
        return [server for server in alive if server.version == required]

    def describe_failures(self) -> str:
        """One paragraph for every server that is not usable, with the end of its log."""
        lines = []
        for server in self.all:
            if server.exited():
                lines.append(f"server {server.name} ended. Its log ends:\n{server.log_tail()}")
            elif server.unusable:
                lines.append(f"server {server.name} is unusable: {server.unusable}")
            elif self.required_version not in (None, server.version):
                lines.append(f"server {server.name} holds weights of version {server.version}, not the current ones")
            elif not server.healthy():
                lines.append(f"server {server.name} does not answer /health. Its log ends:\n{server.log_tail()}")
        return "\n".join(lines) or "every server answers /health"

    def close(self) -> None:
        """Ends every process that was started here, orderly first, then by force."""
        for holder in self._reserved:
            holder.close()
        processes = [server.process for server in self.all if server.process is not None]
        for process in processes:
            signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + 5
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            end_group(process)
        for server in self.all:
            server.ready = False

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_key(self, key: str) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / KEY_FILE
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)

    def _launch(self, index: int, port: int, key: str) -> Server:
        log = self.run_dir / "logs" / f"server_{index}.log"
        process = launch(
            self.cfg,
            self.model_dir,
            index=index,
            port=port,
            key=key,
            device=self.device,
            transport=self.transport,
            log=log,
        )
        return Server(url=f"http://{HOST}:{port}", key=key, process=process, log_path=log)

    def _reserve_port(self, port: int) -> int:
        try:
            holder = reserve_port(port)
        except OSError as error:
            raise ServerError(
                f"rollout.ports: port {port} of {HOST} can't be taken ({error.strerror}): "
                "end what listens there, or leave rollout.ports empty to take free ones"
            ) from None
        self._reserved.append(holder)
        return int(holder.getsockname()[1])


@contextlib.contextmanager
def open_servers(cfg: RolloutConfig, model_dir: Path | str, run_dir: Path | str) -> Iterator[Servers]:
    """Servers of `model_dir`, started and healthy; ended when the block is left. Logs go to `run_dir`/logs."""
    with Servers(cfg, model_dir, run_dir) as servers:
        yield servers.start().wait_ready()


def _device(cfg: RolloutConfig) -> str:
    if cfg.device != "auto":
        return cfg.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _given_key(cfg: RolloutConfig) -> str:
    if cfg.key_file:
        path = Path(cfg.key_file)
        if not path.is_file():
            raise ServerError(f"rollout.key_file={path}: no such file; `t1 serve` prints where it keeps the key")
        if path.stat().st_mode & 0o077:
            raise ServerError(f"rollout.key_file={path}: readable by others; chmod 600 it")
        return path.read_text().strip()
    key = os.environ.get(REMOTE_KEY_ENV, "")
    if not key:
        raise ServerError(f"rollout.urls needs the servers' key: set rollout.key_file or {REMOTE_KEY_ENV}")
    return key
