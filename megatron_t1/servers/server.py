"""One vLLM server as the trainer sees it: its address and key, the weights it holds, whether it may be asked."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from megatron_t1.files import of_shape, parse_json
from megatron_t1.servers.die_with_parent import ENDED_BY_ITSELF

UNPUSHED = -1
"""Version of a server that holds what it started with, random numbers where a push is to bring the weights."""
ASLEEP = -2
"""Version of a server that gave its weights away; the next push brings some."""
NO_LOGPROB = -9999.0
"""What vLLM sends for a logprob that is NaN, minus infinity or not there, none of which JSON has."""
_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 65536
_VERSION = re.compile(r"[0-9]{1,18}")
_METRICS_BYTES = 1 << 20
_CACHE_USAGE = re.compile(rb"^vllm:kv_cache_usage_perc\{[^}]*\} ([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)$", re.M)
_DISTURBED = "Error in memory profiling"
"""What vLLM says where other processes free memory of its GPU while it starts and measures what is free."""
_NUM_PROBES, _MAX_PROBE_PAUSE_S = 5, 32767
_BROKEN = (OSError, http.client.HTTPException)
"""What urllib raises: no connection, none in time, or an answer that is no HTTP or was cut off."""
_TELLS_LENGTH = ("Content-Length", "Transfer-Encoding")
"""Headers of which every answer of vLLM has one."""
_ERROR_LINE = re.compile(r"\b[A-Z]\w*(Error|Exception): ")


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
    version: int = UNPUSHED
    """Weight version it holds, as far as we know."""
    max_model_len: int = 0
    """Longest prompt + response, tokens; known once it is ready."""
    unusable: str | None = None
    """Why no samples may be asked of it any more: a failed push left unknown weights. None: fine."""
    distrusted: bool = False
    """It was lost and is looked at again: a push may have left unknown weights under the version that it says."""
    ready: bool = False
    """It answered /health once."""
    started_at: float = field(default_factory=time.monotonic)
    """When it was started, or first looked at; time.monotonic()."""

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def exited(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def mishap(self) -> str | None:
        """What it exited of, where that is none of its own faults and another start may go well; else None."""
        if not self.exited():
            return None
        lines = self._log_lines() or [""]
        if not lines[-1].startswith(ENDED_BY_ITSELF):
            return "was killed"
        return "found its GPU's memory being freed by others" if any(_DISTURBED in line for line in lines) else None

    def log_tail(self) -> str:
        """Where its log is, the errors in it and its last lines, indented: mostly the last one is the cause."""
        if (lines := self._log_lines()) is None:
            return "    (its log is where it was started)"
        lines = [line for line in lines if not line.startswith(ENDED_BY_ITSELF)]
        # The root cause stands far above the end: the API server prints its own traceback after the engine's.
        early = [line for line in lines[:-_LOG_TAIL_LINES] if _ERROR_LINE.search(line)][:5]
        shown = [*early, "[...]", *lines[-_LOG_TAIL_LINES:]] if early else lines[-_LOG_TAIL_LINES:]
        return "\n".join(f"    {line}" for line in [f"(whole log: {self.log_path})", *shown])

    def _log_lines(self) -> list[str] | None:
        """The end of its log; None when it is not on this host."""
        if self.log_path is None or not self.log_path.exists():
            return None
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()

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
                if response.version == 11 and not any(map(response.headers.get, _TELLS_LENGTH)):
                    raise http.client.BadStatusLine("it was cut off before it told its length")
        except urllib.error.HTTPError as error:
            text = ""
            with contextlib.suppress(*_BROKEN):
                text = error.read(4000).decode(errors="replace")
            raise ServerError(f"server {self.name}: {path} answered {error.code}: {text.strip()}") from None
        except _BROKEN as error:  # URLError is one
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ServerError(f"server {self.name}: {path} did not answer within {timeout_s:g} s") from None
            raise ServerError(f"server {self.name}: {path}: {reason!r:.200}\n{self.log_tail()}") from None
        try:
            return parse_json(raw) if raw else None
        except ValueError as error:
            raise ServerError(f"server {self.name}: {path} answered no JSON: {error}: {raw[:200]!r}") from None

    def _told(self, path: str, shape: Any) -> Any:
        try:
            return of_shape(self.call("GET", path, timeout_s=30), shape)
        except ValueError as error:
            raise ServerError(f"server {self.name}: {path} answered something else than vLLM does: {error}") from None

    def healthy(self, timeout_s: float = 5.0) -> bool:
        try:
            with _OPENER.open(self.url + "/health", timeout=timeout_s) as response:
                return bool(response.status == 200)
        except _BROKEN:
            return False

    def cache_usage(self) -> float | None:
        """Share of its cache of keys and values that is taken; None when it does not say."""
        request = urllib.request.Request(self.url + "/metrics", headers=dict(self.headers))
        try:
            with _OPENER.open(request, timeout=2.0) as response:
                found = _CACHE_USAGE.search(response.read(_METRICS_BYTES))
        except _BROKEN:
            return None
        return float(found[1]) if found else None

    def hangs(self, timeout_s: float) -> bool:
        """Whether it takes connections but answers nothing: stopped or stuck, not ended."""
        try:
            _OPENER.open(self.url + "/health", timeout=timeout_s).close()
        except _BROKEN as error:
            return isinstance(getattr(error, "reason", error), TimeoutError)
        return False

    def introduce(self) -> None:
        """Learns what it serves, once it is healthy, and frees it from the pause of a trainer that died in a push.

        Raises:
            ServerError: the key is wrong, or it is no vLLM server of ours.
        """
        self.max_model_len = self._told("/v1/models", _Models)["data"][0]["max_model_len"]
        try:
            held = parse_version(self._told("/weight_info", _WeightInfo)["weight_version"])
        except ValueError as error:
            raise ServerError(f"server {self.name}: /weight_info answered {error}") from None
        self.version = UNPUSHED if self.distrusted else held
        if self._told("/is_paused", _IsPaused)["is_paused"]:
            self.call("POST", "/resume", timeout_s=30)
        self.ready = True


class _Model(TypedDict):
    max_model_len: Annotated[int, msgspec.Meta(gt=0)]


class _Models(TypedDict):
    data: Annotated[list[_Model], msgspec.Meta(min_length=1)]


class _WeightInfo(TypedDict):
    weight_version: str


class _IsPaused(TypedDict):
    is_paused: bool


def parse_version(text: str) -> int:
    """vLLM's weight version as a number; `default` is UNPUSHED. Raises ValueError for other words."""
    if text == "default":
        return UNPUSHED
    if not _VERSION.fullmatch(text):
        raise ValueError(f"weight version {text!r:.60}, which is no number")
    return int(text)


def watched_socket(address: tuple[Any, ...], silence_s: float) -> socket.socket:
    """For a connection to `address` (as `getaddrinfo` lists it) that breaks when its other end is gone for `silence_s`.

    A host that lost its power closes no connection, and once it is back it knows of none: who waits for an answer and
    sends nothing would wait on. The kernels ask each other meanwhile; that of a busy server answers too.
    """
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pause_s = min(_MAX_PROBE_PAUSE_S, math.ceil(silence_s / (1 + _NUM_PROBES)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES)
    # While something sent is not acknowledged, a request that came too late, they repeat it and ask nothing.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * pause_s * (1 + _NUM_PROBES))
    return made


def weights_in_words(version: int) -> str:
    """For messages: what a server of this version holds."""
    return {UNPUSHED: "what it started with", ASLEEP: "no weights"}.get(version, f"version {version}")


# Servers are on this host or named by the user: a proxy of the environment must not see their traffic.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
