"""What is tried on the emulated cluster: `scenarios.py NAME WORK_DIR`, run inside of `cluster.sh` by test_slurm.py.

WORK_DIR holds model/, rl.jsonl and heldout.jsonl. Each scenario submits the real batch scripts with CPU overrides,
disturbs the job, and leaves what it saw in WORK_DIR/seen.json; the test asserts on that and on the files of the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 1400  # a loaded machine is ten times slower than an idle one


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Job:
    """A submitted batch script."""

    def __init__(self, work: Path, script: str, *options: object, nodes: str, env: dict[str, object]) -> None:
        self.log = work / "job.log"
        overrides = {
            "T1_HOME": ROOT, "T1_PYTHON": sys.executable,
            "MODEL": work / "model", "DATA": work, "RUN_DIR": work / "run",
            "VLLM_TP": 1, "SERVERS_PER_NODE": 1, "VLLM_NODES": 0, "OMP_NUM_THREADS": 1, **env,
        }  # fmt: skip
        self.run_dir = Path(str(overrides["RUN_DIR"]))
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


def other_nodes(work: Path) -> dict[str, Any]:
    """Four nodes, PP2 x DP2 on two of them: one fails, the job goes on with three; then it is cancelled."""
    env = {"VLLM_NODES": 2, "RANKS": 2}
    options = ["--parallel.tensor", 1, "--parallel.sequence_parallel", "false", "--parallel.pipeline", 2,
               "--rl.checkpoint.every_steps", 1, "--rl.steps", 1000]  # fmt: skip
    job = Job(work, "t1_qwen14b.sh", *options, nodes="3-4", env=env)
    job.until("two steps", lambda: len(job.steps()) >= 2)
    for state in ("drain", "down"):  # drained too: its slurmd lives and would bring it back
        run("scontrol", "update", "nodename=n2", f"state={state}", "reason=test")
    failed_at = job.steps()
    job.until("the requeue", lambda: job.restarts() == 1)
    job.until("two more steps", lambda: len(job.steps()) >= len(failed_at) + 2)
    run("scancel", job.id)
    ended = job.end()
    wait_until(lambda: not processes("megatron_t1"))
    return {
        "state": ended["JobState"], "restarts": ended["Restarts"], "failed_at": failed_at, "steps": job.steps(),
        "log": job.log.read_text(), "left": processes("megatron_t1"), "text": job.text(),
        "checkpoints": [path.name for path in (job.run_dir / "rl/checkpoints").glob("step_????????")],
    }  # fmt: skip


def tune_train_evaluate(work: Path) -> dict[str, Any]:
    """sft.sh on two nodes, RL of what it made with a server beside the trainer on both, then evaluate.sh."""
    seen = {}
    job = Job(work, "sft.sh", "--sft.max_steps", 3, "--sft.batch_size", 4, nodes="2", env={"RANKS": 1})
    seen["sft"] = {**job.end(), "text": job.text()}
    options = ["--parallel.tensor", 1, "--parallel.sequence_parallel", "false", "--rl.steps", 2]
    env: dict[str, object] = {"RANKS": 1, "MODEL": work / "run/sft/hf", "RUN_DIR": work / "trained"}
    job = Job(work, "t1_qwen32b.sh", *options, nodes="2", env=env)
    seen["rl"] = {**job.end(), "text": job.text(), "steps": job.steps()}
    options = ["--evaluate.sampling.max_new_tokens", 24, "--rollout.num_servers", 1]
    env = {"MODEL": work / "trained/rl/hf", "RUN_DIR": work / "evaluation"}
    job = Job(work, "evaluate.sh", *options, nodes="1", env=env)
    seen["evaluate"] = {**job.end(), "text": job.text(), "log": job.log.read_text()}
    return seen | {"left": processes("megatron_t1")}


def clear_errors(work: Path) -> dict[str, Any]:
    """Jobs that can't work: their exit code and last line."""
    seen = {}
    cases = {
        "typo": ["--rl.stepps", 3],
        "server": ["--rollout.vllm_args", "{no-such-option: 1}"],
    }
    for name, options in cases.items():
        folder = work / name
        shutil.copytree(work / "model", folder / "model")
        shutil.copy(work / "rl.jsonl", folder)
        job = Job(
            folder, "t1_glm9b.sh", "--parallel.pipeline", 1, *options, nodes="2", env={"VLLM_NODES": 1, "RANKS": 2}
        )
        seen[name] = {**job.end(), "log": job.log.read_text(), "left": processes("megatron_t1")}
    return seen


def headers(work: Path) -> dict[str, Any]:
    """What sbatch says of every script's header, and of broken ones."""
    broken = {
        "no_such_option": "--no-such-option=1",
        "time": "--time=1:2:3:4:5",
        "nodes": "--nodes=9",
        "gpus": "--gpus-per-node=9",
    }
    commands = {path.name: [path] for path in sorted((ROOT / "slurm").glob("*.sh")) if path.name != "lib.sh"}
    commands |= {name: [option, ROOT / "slurm/sft.sh"] for name, option in broken.items()}
    seen = {}
    for name, words in commands.items():
        done = subprocess.run(["sbatch", "--test-only", *map(str, words)], capture_output=True, text=True)
        seen[name] = {"code": done.returncode, "said": done.stderr}
    return seen


def wait_until(found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:
        time.sleep(0.2)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    scenario = {f.__name__: f for f in (headers, stop_and_go_on, other_nodes, tune_train_evaluate, clear_errors)}[
        sys.argv[1]
    ]
    (folder / "seen.json").write_text(json.dumps(scenario(folder), indent=1))
