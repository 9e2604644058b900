"""`t1 serve`: keeps this host's servers up, and tells other hosts of them.

    loop: a server ended or hangs -> withdrawn, started again; a server became healthy -> announced

Servers on loopback are for this host alone and are not announced: their URLs are printed.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.keys import KEY_FILE
from megatron_t1.servers.launch import begins_random
from megatron_t1.servers.registry import Registry
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers

_LOOK_INTERVAL_S = 1.0
_MAX_FAILED_STARTS = 3
"""Starts of one server, one after the other, that may fail before all of them are given up."""


def serve(cfg: RolloutConfig, model_dir: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Blocks until interrupted.

    Raises:
        ServerError: a server did not come up at first, or `_MAX_FAILED_STARTS` times after it was lost. Of servers that
            sleep by turns only the former: they find no room on the GPU while the trainer has it.
    """
    registry = None if cfg.on_loopback else Registry(cfg.registry_folder(run_dir))
    with Servers(cfg, model_dir, run_dir) as servers, contextlib.ExitStack() as stack:
        servers.start()
        names = [f"{socket.gethostname()}_{index}" for index in range(len(servers.all))]
        if registry:
            for name in names:
                stack.callback(registry.withdraw, name)
        servers.wait_ready()
        if registry:
            for name, server in zip(names, servers.all, strict=True):
                registry.announce(name, server.url, server.log_path)
        urls = [server.url for server in servers.all]
        if begins_random(cfg, model_dir):
            say("the servers hold random weights until a trainer pushes its own")
        say(f"rollout.urls: {urls}\nrollout.key_file: {cfg.key_file or run_dir / KEY_FILE}\nCtrl-C ends them")
        failed_starts: Counter[str] = Counter()
        pool = stack.enter_context(ThreadPoolExecutor(len(names)))
        while True:
            for index, why in enumerate(pool.map(lambda server: _lost(server, cfg), list(servers.all))):
                name, server = names[index], servers.all[index]
                if why is None:
                    continue
                if registry:
                    registry.withdraw_to_restart(name)
                failed_starts[name] += not server.ready and not cfg.sleep  # else it may be the trainer's turn
                if failed_starts[name] >= _MAX_FAILED_STARTS:
                    raise ServerError(f"server {name} does not come up again: it {why}\n{server.log_tail()}")
                say(f"server {server.name} {why} and is started again")
                server.unusable = why
            servers.revive()
            waiting = [i for i, server in enumerate(servers.all) if not server.ready]
            servers.poll()
            for index in waiting:
                if (server := servers.all[index]).ready:
                    failed_starts[names[index]] = 0
                    say(f"server {server.name} is back")
                    if registry:
                        registry.announce(names[index], server.url, server.log_path)
            time.sleep(_LOOK_INTERVAL_S)


def _lost(server: Server, cfg: RolloutConfig) -> str | None:
    """Why a server has to be started again, or None."""
    if server.exited():
        return "ended"
    if server.ready and not server.healthy(cfg.health_timeout_s):  # refuses, hangs, or says that its engine is dead
        return f"gave no good answer to /health within rollout.health_timeout_s = {cfg.health_timeout_s:g} s"
    if not server.ready and time.monotonic() - server.started_at > cfg.startup_timeout_s:
        return f"was not healthy within rollout.startup_timeout_s = {cfg.startup_timeout_s:g} s"
    return None
