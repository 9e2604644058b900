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
    job = Job(work, "rl.sh", "--rl.steps", 6, nodes="2", env={"VLLM_NODES": 1, "RANKS": 2})
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
    """Three nodes that train and serve by turns: one fails, the job goes on with two; then it is cancelled."""
    options = ["--config", "examples/shared_gpus.yaml", "--parallel.tensor", 1, "--parallel.sequence_parallel", "false",
               "--rl.checkpoint.every_steps", 1, "--rl.steps", 1000]  # fmt: skip
    job = Job(work, "rl.sh", *options, nodes="2-3", env={"RANKS": 1, "CONFIG": "examples/qwen2.5-14b/rl.yaml"})
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


def chain(work: Path) -> dict[str, Any]:
    """pipeline.sh on two nodes, a server beside the trainer on both, in a container of pyxis; RL is cancelled after a
    step, which breaks the chain; the same command goes on, in a container of Apptainer."""
    bin_dir, seen = work / "bin", {}
    bin_dir.mkdir()
    for name, text in STAND_INS.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    config = work / "configs"
    shutil.copytree(ROOT / "examples/qwen2.5-32b", config)
    options = {
        "--config": "tests/slurm/tiny.yaml", "--parallel.tensor": 1, "--parallel.sequence_parallel": "false",
        "--sft.max_steps": 3, "--sft.batch_size": 4, "--rl.steps": 6, "--rl.checkpoint.every_steps": 1,
        "--evaluate.sampling.max_new_tokens": 24, "--scaling.sampling.max_new_tokens": 24,
        "--scaling.budgets": "[8,16]", "--scaling.max_answer_tokens": 4, "--scaling.sampling.num_samples": 2,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    os.environ |= {
        "PATH": f"{bin_dir}:{os.environ['PATH']}", "T1_HOME": str(ROOT), "T1_PYTHON": sys.executable,
        "MODEL": str(work / "model"), "DATA": str(work), "RUN_DIR": str(work / "run"), "CONFIGS": str(config),
        "VLLM_TP": "1", "SERVERS_PER_NODE": "1", "VLLM_NODES": "0", "RANKS": "1", "OMP_NUM_THREADS": "1",
        "SBATCH_OPTIONS": f"--nodes=2 --output={work}/%x-%j.log", "T1_TEST_SEEN": str(work / "containers"),
    }  # fmt: skip
    steps = work / "run/rl/metrics.jsonl"
    for turn, image in enumerate(("registry/t1:1", "t1.sif")):
        os.environ["T1_CONTAINER"] = image
        seen[f"submitted {turn}"] = run("slurm/pipeline.sh", *words)
        jobs = dict(line.split() for line in (work / "run/pipeline/jobs").read_text().splitlines())
        if turn == 0:
            wait_until(lambda: steps.exists() and steps.read_text().count("\n") >= 1, DEADLINE_S)
            run("scancel", jobs["rl"])
        wait_until(lambda jobs=jobs: not set(jobs.values()) & set(run("squeue", "-h", "-o", "%i").split()), DEADLINE_S)
        seen[f"status {turn}"] = run("slurm/pipeline.sh", "status")
    seen["again"] = run("slurm/pipeline.sh", *words)
    seen["text"] = "\n".join(
        path.read_text()[-1500:] for path in [*work.glob("*.log"), *work.glob("run/logs/[ts]*.log")]
    )
    return seen | {"left": processes("megatron_t1"), "containers": (work / "containers").read_text().splitlines()}


STAND_INS = {
    # The plugin takes its options off srun's; the word that the container was entered is left in a file.
    "srun": """#!/bin/bash
words=()
for word in "$@"; do
  case $word in
    --container-image=*) echo "pyxis ${word#*=}" >>"$T1_TEST_SEEN" ;;
    --container-mounts=*) ;;
    *) words+=("$word") ;;
  esac
done
exec /usr/bin/srun "${words[@]}"
""",
    "apptainer": """#!/bin/bash
[ "$1 $2 $3" = "exec --nv --bind" ] || exit 2
echo "apptainer $5" >>"$T1_TEST_SEEN"
exec "${@:6}"
""",
}


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
            folder,
            "rl.sh",
            "--parallel.pipeline",
            1,
            *options,
            nodes="2",
            env={"VLLM_NODES": 1, "RANKS": 2, "CONFIG": "examples/glm-4-9b/rl.yaml"},
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
    commands = {
        path.name: [path]
        for path in sorted((ROOT / "slurm").glob("*.sh"))
        if path.name not in ("lib.sh", "pipeline.sh")
    }
    commands |= {name: [option, ROOT / "slurm/sft.sh"] for name, option in broken.items()}
    seen = {}
    for name, words in commands.items():
        done = subprocess.run(["sbatch", "--test-only", *map(str, words)], capture_output=True, text=True)
        seen[name] = {"code": done.returncode, "said": done.stderr}
    return seen


def wait_until(found: Callable[[], Any], patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not found() and time.monotonic() < deadline:
        time.sleep(0.2)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    scenario = {f.__name__: f for f in (headers, stop_and_go_on, other_nodes, chain, clear_errors)}[sys.argv[1]]
    (folder / "seen.json").write_text(json.dumps(scenario(folder), indent=1))
