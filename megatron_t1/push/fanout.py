"""vLLM's weight-update calls, made on all servers at once, with a deadline and a record of what became of each.

A server that fails is dropped from the push and the others go on; the push fails when none is left. What a failure
leaves behind is known by phase: until the load (or the stream) begins the server holds the weights it held, after that
nobody knows. A server on unknown weights is marked unusable, and never asked again before it was started anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from megatron_t1.push.ranks import NoServerError
from megatron_t1.servers.server import Server, ServerError, parse_version
from megatron_t1.servers.servers import Servers
from megatron_t1.warn import warn


class Fanout:
    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.targets: list[Server] = []
        self.version = 0
        self._introduced: set[Server] = set()
        self.failed: dict[str, str] = {}
        """Server name -> why it was dropped from the current push."""
        self._paused = False
        self.mixed = False
        """The servers still in the push hold a part of the new weights: whatever fails now leaves unknown ones."""
        self.seconds: dict[str, float] = {}
        """Phase -> wall seconds of the current push."""

    def open(self, version: int, targets: list[Server]) -> None:
        """Begins a push into `targets`."""
        self.version = version
        self.targets = list(targets)
        self.failed = {}
        self.seconds = {}
        self._paused = self.mixed = False
        if not targets:
            raise NoServerError(f"push of version {version}: no server is alive:\n{self.servers.describe_failures()}")

    def pause(self) -> None:
        """Deals with the requests in flight by the stated rule (`rollout.pause_mode`) and holds new ones back."""
        mode = self.servers.cfg.pause_mode
        self._paused = True
        self.each("pause", lambda server: self._post(server, f"/pause?mode={mode}"), spoils=False)

    def introduce(self, init_info: dict[str, Any]) -> None:
        """Tells the servers that have not heard it yet what lies where, and which tensors will come; those that failed
        since hear it again, for another process may answer at their URL by now."""

        def introduce(server: Server) -> None:
            if server not in self._introduced:
                self._post(server, "/init_weight_transfer_engine", {"init_info": init_info})
                self._introduced.add(server)

        self.each("init", introduce, spoils=False)

    def start(self) -> None:
        self.each("start", self._start, spoils=False)

    def receive(self, update_info: dict[str, Any]) -> None:
        """Has every server bring the bytes in and verify them. No weight is touched yet."""
        self.start()
        update = {"step": "receive", **update_info}
        self.each("receive", lambda server: self.update(server, update), spoils=False)

    def load(self) -> None:
        """Pauses the servers and has them load what they received."""
        self.pause()
        self.each("load", lambda server: self.update(server, {"step": "load"}))

    def update(self, server: Server, update_info: dict[str, Any]) -> None:
        self._post(server, "/update_weights", {"update_info": update_info})

    def finish(self) -> None:
        """Puts the weights in force under this push's version, forgets the prefix cache, and lets requests go on."""
        body = {"weight_version": str(self.version)}
        self.each("finish", lambda server: self._post(server, "/finish_weight_update", body))
        self.each("cache", self._reset_cache)
        self.each("check", self._check_version)
        self.each("resume", lambda server: self._post(server, "/resume"))

    def num_workers(self) -> list[int]:
        """Of each server in the push."""
        counted: dict[Server, int] = {}

        def count(server: Server) -> None:
            counted[server] = int(self._get(server, "/get_world_size")["world_size"])

        self.each("workers", count, spoils=False)
        return [counted[server] for server in self.targets]

    def each(self, phase: str, call: Callable[[Server], None], *, spoils: bool = True) -> None:
        """Runs `call` on all servers still in the push at once; drops those where it raises ServerError.

        `spoils`: a failure leaves unknown weights. Raises NoServerError when none is left.
        """
        self.drop(phase, self.attempt(phase, call), spoils=spoils)

    def attempt(self, phase: str, call: Callable[[Server], None]) -> dict[Server, ServerError]:
        """The errors of `call`, run on all servers still in the push at once."""
        began = time.monotonic()
        targets = list(self.targets)
        with ThreadPoolExecutor(len(targets)) as pool:
            errors = list(pool.map(lambda server: _error_of(call, server), targets))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began
        return {server: error for server, error in zip(targets, errors, strict=True) if error is not None}

    def drop(self, phase: str, errors: dict[Server, ServerError], *, spoils: bool) -> None:
        """Leaves these servers out. Raises NoServerError when none is left."""
        for server, error in errors.items():
            self._drop(server, phase, error, spoils or self.mixed)
        if not self.targets:
            reasons = "\n".join(self.failed.values())
            raise NoServerError(f"push of version {self.version} reached no server:\n{reasons}")

    def lose_all(self, phase: str, reason: str, *, spoils: bool) -> NoReturn:
        """Drops all servers still in the push, for a failure that does not say whose it is; raises NoServerError."""
        errors = {server: ServerError(f"server {server.name}: {reason}") for server in self.targets}
        self.drop(phase, errors, spoils=spoils)
        raise AssertionError("`drop` raises when no server is left")

    def _drop(self, server: Server, phase: str, error: ServerError, spoils: bool) -> None:
        message = f"push of version {self.version}, phase {phase}: {error}"
        self.targets.remove(server)
        self._introduced.discard(server)
        if spoils:
            server.unusable = f"unknown weights: {message}"
        else:
            message += f"; it keeps version {server.version}"
            if self._paused and not server.exited():
                _error_of(lambda s: s.call("POST", "/resume", timeout_s=2), server)
        self.failed[server.name] = message
        warn(f"server {server.name} left out: {message}")

    def _start(self, server: Server) -> None:
        try:
            self._post(server, "/start_weight_update")
        except ServerError as error:
            if "already active" not in str(error):
                raise
            # A trainer died in its push, or one of this server's workers refused what another one took.
            _error_of(lambda s: self.update(s, {"step": "cancel"}), server)
            self._post(server, "/start_weight_update")

    def _post(self, server: Server, path: str, body: Any = None) -> Any:
        return server.call("POST", path, body, timeout_s=self.servers.cfg.sync_timeout_s)

    def _get(self, server: Server, path: str) -> Any:
        return server.call("GET", path, timeout_s=self.servers.cfg.sync_timeout_s)

    def _reset_cache(self, server: Server) -> None:
        reply = self._post(server, "/reset_prefix_cache?reset_running_requests=true")
        if not reply["success"]:
            raise ServerError(f"server {server.name}: the prefix cache of the old weights could not be reset")

    def _check_version(self, server: Server) -> None:
        held = self._get(server, "/weight_info")["weight_version"]
        if parse_version(held) != self.version:
            raise ServerError(f"server {server.name} says that it holds version {held}")
        server.version = self.version


def _error_of(call: Callable[[Server], Any], server: Server) -> ServerError | None:
    try:
        call(server)
    except ServerError as error:
        return error
    return None
