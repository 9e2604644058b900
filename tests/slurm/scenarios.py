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
TINY = "tests/slurm/tiny.yaml"
DEADLINE_S = 1400  # a loaded machine is ten times slower than an idle one


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Job:
    """A job of Slurm's: one of the batch scripts."""

    def __init__(self, identity: str, log: Path, run_dir: Path) -> None:
        self.id, self.log, self.run_dir = identity, log, run_dir

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


def submit(work: Path, script: str, *options: object, nodes: str, env: dict[str, object]) -> Job:
    overrides = surroundings(work) | env
    os.environ |= {name: str(value) for name, value in overrides.items()}
    log = work / "job.log"
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", f"slurm/{script}"]
    return Job(run(*command, *options), log, Path(str(overrides["RUN_DIR"])))


def surroundings(work: Path) -> dict[str, object]:
    """Variables of the batch scripts."""
    return {
        "T1_HOME": ROOT, "T1_PYTHON": sys.executable, "MODEL": work / "model", "DATA": work, "RUN_DIR": work / "run",
        "VLLM_TP": 1, "SERVERS_PER_NODE": 1, "VLLM_NODES": 0, "OMP_NUM_THREADS": 1,
    }  # fmt: skip


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


def other_nodes(work: Path) -> dict[str, Any]:
    """Three nodes that train and serve by turns: one fails, the job goes on with two; then it is cancelled."""
    options = ["--config", TINY, "--config", "examples/shared_gpus.yaml", "--parallel.tensor", 1,
               "--parallel.sequence_parallel", "false", "--rl.checkpoint.every_steps", 1,
               "--rl.steps", 1000]  # fmt: skip
    job = submit(work, "rl.sh", *options, nodes="2-3", env={"RANKS": 1, "CONFIG": "examples/qwen2.5-14b/rl.yaml"})
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
    """pipeline.sh on a node, a server beside two trainer ranks (TP2), in a container of pyxis. Again from its SFT on,
    in one of Apptainer: RL's server is killed, its job stopped by USR1, requeued, and then cancelled, which breaks the
    chain; the same command goes on. Last, its checkpoint becomes a Hugging Face folder by convert.sh."""
    bin_dir, seen = work / "bin", {}
    bin_dir.mkdir()
    for name, text in STAND_INS.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    config = work / "configs"
    shutil.copytree(ROOT / "examples/qwen2.5-32b", config)
    options = {
        "--config": TINY, "--sft.max_steps": 3, "--sft.batch_size": 4, "--rl.steps": 8,
        "--reward.penalties.enabled": "[overlong]", "--evaluate.sampling.max_new_tokens": 24,
        "--scaling.sampling.max_new_tokens": 24, "--scaling.budgets": "[8,16]", "--scaling.max_answer_tokens": 4,
        "--scaling.sampling.num_samples": 2,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    variables = surroundings(work) | {
        "PATH": f"{bin_dir}:{os.environ['PATH']}", "CONFIGS": config, "RANKS": 2, "T1_CONTAINER": "registry/t1:1",
        "SBATCH_OPTIONS": f"--nodes=1 --output={work}/%x-%j.log", "T1_TEST_SEEN": work / "containers",
    }  # fmt: skip
    os.environ |= {name: str(value) for name, value in variables.items()}

    def submitted(run_dir: Path) -> dict[str, Job]:
        lines = (run_dir / "pipeline/jobs").read_text().splitlines()
        return {name: Job(job, work / f"t1-{name}-{job}.log", run_dir) for name, job in map(str.split, lines)}

    seen["submitted"] = run("slurm/pipeline.sh", *words)
    for job in submitted(work / "run").values():
        job.end()
    seen["status"] = run("slurm/pipeline.sh", "status")

    struck = work / "struck"
    shutil.copytree(work / "run/sft", struck / "sft")
    os.environ |= {"RUN_DIR": str(struck), "T1_CONTAINER": "t1.sif"}
    run("slurm/pipeline.sh", *words)
    rl = submitted(struck)["rl"]
    rl.until("the first step", rl.steps)
    seen["command_lines"] = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes("megatron_t1")]
    (server,) = processes("vllm.entrypoints", "--port")[-1:]
    os.kill(server, signal.SIGKILL)
    killed_at = len(rl.steps())
    rl.until("a step after the server was killed", lambda: len(rl.steps()) > killed_at + 1)
    run("scancel", "--signal=USR1", "--batch", rl.id)
    rl.until("the requeue", lambda: rl.restarts() == 1)
    seen["stopped_at"] = rl.steps()
    seen["checkpoints"] = [path.name for path in (struck / "rl/checkpoints").iterdir()]
    rl.until("a step after the requeue", lambda: len(rl.steps()) > len(seen["stopped_at"]))
    run("scancel", rl.id)
    for job in submitted(struck).values():
        job.end()
    seen["cancelled_at"], seen["struck"] = rl.steps(), run("slurm/pipeline.sh", "status")
    seen["submitted again"] = run("slurm/pipeline.sh", *words)
    for job in submitted(struck).values():
        job.end()
    seen["status again"], seen["done"] = run("slurm/pipeline.sh", "status"), run("slurm/pipeline.sh", *words)

    env: dict[str, object] = {"RUN_DIR": work / "convert", "SBATCH_OPTIONS": "", "T1_CONTAINER": ""}
    convert = submit(
        work, "convert.sh", "to-hf", struck / "rl/checkpoints/step_00000008", work / "hf", nodes="1", env=env
    )
    seen["convert"] = convert.end()["JobState"]
    logs = [rl.log, *(work / "convert").rglob("*.log"), *struck.rglob("*.log"), *work.glob("*.log")]
    return {
        **seen, "rl": rl.log.read_text(), "left": processes("megatron_t1"),
        "text": "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in logs),
        "containers": (work / "containers").read_text().splitlines(),
    }  # fmt: skip


def recipe(work: Path) -> dict[str, Any]:
    """All seven scripts on the quickstart's task, from raw questions on: README.md has the command; too long for CI."""
    run_dir, data, configs = work / "run", work / "data", work / "configs"
    questions = [json.loads(line) for line in (work / "rl.jsonl").read_text().splitlines()]
    raw = [{"problem": row["prompt"], "answer": row["answer"]} for row in questions[60:160]]
    tables = {
        "questions.jsonl": questions[:60], "raw.jsonl": raw + raw[:5],
        "heldout.jsonl": [json.loads(line) for line in (work / "heldout.jsonl").read_text().splitlines()[:40]],
    }  # fmt: skip
    data.mkdir()
    for name, rows in tables.items():
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs.mkdir()
    for name in ("sft", "rl"):
        shutil.copy(ROOT / "examples/quickstart/quickstart.yaml", configs / f"{name}.yaml")
    shutil.copy(ROOT / "examples/quickstart/synthesize.yaml", configs)
    variables = surroundings(work) | {
        "DATA": data, "CONFIGS": configs, "RANKS": 2, "SBATCH_OPTIONS": f"--nodes=1 --output={work}/%x-%j.log",
    }  # fmt: skip
    os.environ |= {name: str(value) for name, value in variables.items()}
    sizes = ["--sft.max_steps", 4, "--sft.batch_size", 4, "--sft.optim.warmup_steps", 1, "--rl.steps", 4,
             "--rl.prompts_per_step", 8, "--data.heldout", data / "heldout.jsonl"]  # fmt: skip
    print(run("slurm/pipeline.sh", *sizes), flush=True)
    jobs = [line.split()[1] for line in (run_dir / "pipeline/jobs").read_text().splitlines()]
    for job in jobs:
        Job(job, work / "none", run_dir).end()
    seen: dict[str, Any] = {"status": run("slurm/pipeline.sh", "status").splitlines()}
    assert all(line.endswith("finished") for line in seen["status"]), seen["status"]
    both = [run_dir / "rl/hf", work / "megatron"]
    for words in (["to-megatron", *both], ["verify", *both]):
        seen[str(words[0])] = submit(work, "convert.sh", *words, nodes="1", env={}).end()["JobState"]
    print(json.dumps(seen, indent=1))
    return seen


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
        job = submit(
            folder,
            "rl.sh",
            "--config",
            TINY,
            "--parallel.pipeline",
            1,
            *options,
            nodes="2",
            env={"VLLM_NODES": 1, "RANKS": 2, "CONFIG": "examples/glm-4-9b/rl.yaml"},
        )
        seen[name] = {**job.end(), "log": job.log.read_text(), "left": processes("megatron_t1")}
    return seen


def few_variables(work: Path) -> dict[str, Any]:
    """A job that was submitted with few of the variables, and a chain where the site exports few; it is requeued, which
    its step delays. In the Python's place stands a script."""
    python = work / "python"
    python.write_text(f"""#!/bin/bash
[ "$1" != -c ] || exec {sys.executable} "$@"
echo "$*, MASTER_ADDR=${{MASTER_ADDR-}}"
[ "$3" != sft ] || {{ trap "" TERM; for _ in {{1..1000}}; do sleep 0.1; done; }}
""")
    python.chmod(0o755)
    own = {"MODEL": work / "a model", "DATA": work, "T1_PYTHON": python, "T1_HOME": ROOT, "RUN_DIR": work / "run"}
    os.environ |= {name: str(value) for name, value in own.items()}
    (work / "sft.jsonl").touch()
    log = work / "run/logs/trainer.log"
    words = ["--parsable", "--nodes=1", f"--output={work}/job.log", f"--export=PATH,{','.join(own)}"]
    job = Job(run("sbatch", *words, "slurm/convert.sh", "verify", "a", "b"), work / "job.log", work / "run")
    seen = {"state": job.end()["JobState"], "step": log.read_text()}
    log.unlink()
    os.environ |= {"SBATCH_EXPORT": "HOME", "STAGES": "sft", "SBATCH_OPTIONS": f"--nodes=1 --output={work}/chain.log"}
    run("slurm/pipeline.sh")
    ((_, number),) = [line.split() for line in (work / "run/pipeline/jobs").read_text().splitlines()]
    chain = Job(number, work / "chain.log", work / "run")
    chain.until("the step", lambda: log.exists() and "MASTER_ADDR" in log.read_text())
    run("scontrol", "requeue", number)
    seen |= {"state of the chain": chain.show()["JobState"], "again": run("slurm/pipeline.sh")}
    run("scancel", number)
    return seen | {"chain": log.read_text()}


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
    folder = Path(sys.argv[2]).absolute()
    scenario = {f.__name__: f for f in (headers, few_variables, other_nodes, chain, clear_errors, recipe)}[sys.argv[1]]
    (folder / "seen.json").write_text(json.dumps(scenario(folder), indent=1))
