"""What a running RL is doing beside its steps, for `t1 watch`: rl/status.json, written anew every few seconds by a
thread of rank 0. It holds servers, graders, GPU memory of rank 0's host; warnings.jsonl beside it what was warned of.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_t1 import warn
from megatron_t1.files import write_json
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.servers.servers import Servers

EVERY_S = 5.0


@contextlib.contextmanager
def kept(folder: Path, servers: Servers, client: RolloutClient, scorer: Scorer) -> Iterator[None]:
    """Keeps status.json in `folder` up to date while the block runs, and the process's warnings from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    warn.keep_in(folder / "warnings.jsonl")
    over = threading.Event()

    def keep() -> None:
        while not over.wait(EVERY_S):
            with contextlib.suppress(OSError, RuntimeError):  # a full disk, or a dict that changed: it comes again
                write_json(folder / "status.json", _status(servers, client, scorer))

    thread = threading.Thread(target=keep, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * EVERY_S)


def _status(servers: Servers, client: RolloutClient, scorer: Scorer) -> dict[str, Any]:
    alive, load = servers.alive(), client.samples_in_flight()
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "servers": [
            {
                "name": server.name,
                "alive": server in alive,
                "version": server.version,
                "in_flight": load.get(server.url, 0),
                "cache": server.cache_usage() if server in alive else None,
            }
            for server in servers.all
        ],
        "graders": {
            "processes": max(0, len(scorer.pids()) - 1),
            "kills": scorer.num_kills,
            "outcomes": dict(scorer.outcomes),
        },
        "gpus": _gpu_memory() if servers.device == "cuda" else [],
    }


def _gpu_memory() -> list[list[int]]:
    """MiB taken and there, of each GPU of this host."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return [[int(word) for word in line.split(",")] for line in said.splitlines()]
    return []
