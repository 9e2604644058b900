"""`t1 serve`: keeps this host's servers up, and tells other hosts of them.

    loop: a server ended, hangs, or the trainer gave it up -> ended, withdrawn; it is the servers' turn -> started
    (again); a server became healthy -> announced

Servers on loopback are for this host alone and are not announced: their URLs are printed.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

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
        ServerError: a server did not come up `_MAX_FAILED_STARTS` times; or at first, unless it was a mishap, or it
            shares its GPUs by turns and may have found no room.
    """
    with Servers(cfg, model_dir, run_dir) as servers, contextlib.ExitStack() as stack:
        nowhere = Path(stack.enter_context(TemporaryDirectory()))
        registry = Registry(nowhere if cfg.on_loopback else cfg.registry_folder(run_dir))
        names = [f"{socket.gethostname()}_{index}" for index in range(cfg.num_servers)]
        pool = stack.enter_context(ThreadPoolExecutor(len(names)))
        for name in names:
            registry.withdraw(name)  # of a `t1 serve` that was killed
            stack.callback(registry.withdraw, name)
        if not registry.begin_starts(names):
            say(f"it is the trainer's turn ({registry.folder}): the servers start when the trainer lets them")
            while not registry.begin_starts(names):
                time.sleep(_LOOK_INTERVAL_S)
        print(f"starting {', '.join(names)}: logs in {run_dir / 'logs'}", file=sys.stderr, flush=True)
        servers.start()
        announced: set[Server] = set()
        came_up: set[str] = set()
        failed_starts: Counter[str] = Counter()
        while True:
            given_up = registry.given_up()
            found = list(pool.map(lambda server: _lost(server, cfg), servers.all))
            for name, server, why in zip(names, servers.all, found, strict=True):
                if name in given_up:
                    why = "was given up by the trainer"
                if why is None or server.unusable:
                    continue
                failed = not server.ready and name not in given_up
                failed_starts[name] += failed
                hopeless = name not in came_up and not server.mishap() and not cfg.sleep
                if failed and (hopeless or failed_starts[name] >= _MAX_FAILED_STARTS):
                    raise ServerError(f"server {name} does not come up: it {why}. Its log ends:\n{server.log_tail()}")
                say(f"server {server.name} {why} and is started again")
                server.unusable = why
                servers.end([server])
                registry.withdraw(name)
            lost = [name for name, server in zip(names, servers.all, strict=True) if server.unusable]
            if lost and registry.begin_starts(lost):
                servers.revive()
            servers.poll()
            for name, server in zip(names, servers.all, strict=True):
                if not server.ready or server in announced:
                    continue
                registry.announce(name, server.url, server.log_path)
                announced.add(server)
                failed_starts[name] = 0
                if name in came_up:
                    say(f"server {server.name} is back")
                    continue
                came_up.add(name)
                if len(came_up) == len(names):
                    if begins_random(cfg, model_dir):
                        say("the servers hold random weights until a trainer pushes its own")
                    urls = [one.url for one in servers.all]
                    key_file = cfg.key_file or run_dir / KEY_FILE
                    say(f"rollout.urls: {urls}\nrollout.key_file: {key_file}\nCtrl-C ends them")
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
