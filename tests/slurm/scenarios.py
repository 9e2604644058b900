"""What is tried on the emulated cluster: `scenarios.py NAME WORK_DIR`, run inside of `cluster.sh` by test_slurm.py.

WORK_DIR holds model/, rl.jsonl and heldout.jsonl. Each scenario submits the real batch scripts with CPU overrides,
disturbs the job, and leaves what it saw in WORK_DIR/seen.json; the test asserts on that and on the files of the run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 560


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Job:
    """A submitted batch script."""

    def __init__(self, work: Path, script: str, *options: object, nodes: str, env: dict[str, object]) -> None:
        self.run_dir = work / "run"
        self.log = work / "job.log"
        overrides = {
            "T1_HOME": ROOT, "T1_PYTHON": sys.executable,
            "MODEL": work / "model", "DATA": work, "RUN_DIR": self.run_dir,
            "VLLM_TP": 1, "SERVERS_PER_NODE": 1, "OMP_NUM_THREADS": 1, **env,
        }  # fmt: skip
        os.environ |= {name: str(value) for name, value in overrides.items()}
        command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={self.log}", f"slurm/{script}"]
        self.id = run(*command, "--config", "tests/slurm/tiny.yaml", *options)

    def show(self) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", run("scontrol", "show", "job", self.id)))

    def until(self, what: str, found: Callable[[], Any]) -> Any:
        """Waits for `found()` to be true; an end of the job meanwhile, or the deadline, is an error."""
        began = time.monotonic()
        while not (result := found()):
            state = self.show()["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), f"{state} before {what}\n{self.text()}"
            assert time.monotonic() - began < DEADLINE_S, f"no {what}\n{self.text()}"
            time.sleep(0.2)
        return result

    def end(self) -> dict[str, str]:
        """Waits for the end of the job; how it ended."""
        began = time.monotonic()
        while (shown := self.show())["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() - began < DEADLINE_S, self.text()
            time.sleep(0.5)
        return shown

    def steps(self) -> list[int]:
        path = self.run_dir / "rl/metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def text(self) -> str:
        logs = [self.log, *sorted((self.run_dir / "logs").glob("[ts]*.log"))]
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in logs if path.exists())


def processes(*words: str) -> list[int]:
    """Processes of this PID namespace whose command line has all the words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(folder.name))
    return found


def stop_and_go_on(work: Path) -> dict[str, Any]:
    """Two nodes, TP2 on one and a server on the other: the server killed after a step, USR1 after another."""
    job = Job(work, "t1_qwen32b.sh", "--rl.steps", 6, nodes="2", env={"VLLM_NODES": 1, "RANKS": 2})
    job.until("the first step", job.steps)
    command_lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes("megatron_t1")]
    (server,) = processes("vllm.entrypoints", "--host 10.77.0.2", "--port")[-1:]
    os.kill(server, signal.SIGKILL)
    killed_at = len(job.steps())
    job.until("a step after the server was killed", lambda: len(job.steps()) > killed_at + 1)
    run("scancel", "--signal=USR1", "--batch", job.id)
    job.until("the requeue", lambda: job.restarts() == 1)
    stopped_at = job.steps()
    checkpoints = [path.name for path in (job.run_dir / "rl/checkpoints").iterdir()]
    ended = job.end()
    return {
        "state": ended["JobState"], "stopped_at": stopped_at, "checkpoints": checkpoints, "log": job.log.read_text(),
        "command_lines": command_lines, "left": processes("megatron_t1"), "text": job.text(),
    }  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    seen = {"stop_and_go_on": stop_and_go_on}[sys.argv[1]](folder)
    (folder / "seen.json").write_text(json.dumps(seen, indent=1))
