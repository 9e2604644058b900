"""Processes of tests that have their imports done: forked from one that did them, once a session (workers/zygote.py).

A trainer rank spends ten seconds of a core on importing torch, Megatron and transformers, a vLLM server twenty, and a
tiny step a tenth of one. What a fork has not tried is the import and the launcher; tests that start the real command
(`real_t1`) do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "workers"
"""Scripts that tests run in other processes."""


def environment(**more: str) -> dict[str, str]:
    """This process's, with this checkout first on PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", **more, "PYTHONPATH": path}


class Fork:
    """One forked process, with what tests and `Servers` use of a `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            (self.returncode,) = self._forks.codes([self.pid])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With all that it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class Forks:
    """The zygote and what comes out of it. `modules` are imported once, in the environment given here."""

    def __init__(self, modules: Sequence[str], env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-W", "ignore", "-m", "tests.workers.zygote", str(theirs.fileno()), *modules]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._file = ours.makefile("rw")
        ours.close()
        self._lock = threading.Lock()

    def start(
        self,
        target: str | Path,
        *arguments: object,
        num_ranks: int = 1,
        env: dict[str, str] | None = None,
        stdout: Path | None = None,
        stderr: Path | None = None,
        cwd: Path = ROOT,
    ) -> list[Fork]:
        """A script, or a module's name, on `num_ranks` processes as torchrun or srun would start them."""
        env = environment() if env is None else env
        environments = [env]
        if num_ranks > 1:
            environments = [env | variables for variables in rank_variables(num_ranks)]
        request = {
            "target": str(target),
            "arguments": [str(argument) for argument in arguments],
            "environments": environments,
            "stdout": str(stdout or os.devnull),
            "stderr": str(stderr or stdout or os.devnull),
            "cwd": str(cwd),
        }
        return [Fork(self, pid) for pid in self._ask(request)]

    def run(
        self, target: str | Path, *arguments: object, num_ranks: int = 1, timeout_s: float = 600, **options: Path
    ) -> subprocess.CompletedProcess[str]:
        """Starts and awaits them. When one of them fails, the others are given a moment and ended, as torchrun does."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            err.touch()
            ranks = self.start(target, *arguments, num_ranks=num_ranks, stdout=out, stderr=err, **options)
            pids, deadline = [rank.pid for rank in ranks], time.monotonic() + timeout_s
            try:
                while None in (codes := self.codes(pids)) and time.monotonic() < deadline:
                    if any(codes):
                        deadline = min(deadline, time.monotonic() + 10)
                    time.sleep(0.02)
            finally:
                for rank in ranks:
                    rank.kill()
            codes = [rank.wait(60) for rank in ranks]
            failed = next((code for code in codes if code), 0)
            return subprocess.CompletedProcess([str(target)], failed, out.read_text(), err.read_text())

    def codes(self, pids: list[int]) -> list[int | None]:
        """Exit codes, as `subprocess` has them; None for a process that runs."""
        return self._ask({"poll": pids})

    def close(self) -> None:
        self._file.close()
        self._process.wait(60)

    def _ask(self, request: dict[str, object]) -> list:
        with self._lock:
            self._file.write(json.dumps(request) + "\n")
            self._file.flush()
            answer = self._file.readline()
        assert answer, "the process that forks ended"
        return json.loads(answer)


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each of the ranks of one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(num_ranks)
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
