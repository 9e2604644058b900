"""30 RL steps while trainer ranks, servers, graders and `t1 serve` are killed at random, against a run left alone.

    python tests/slurm/chaos.py WORK_DIR [--steps 30] [--seed 0] [--pause 2] [--lag 1]

Too long for CI. On the emulated cluster: one node trains on two ranks, one serves. Both runs are the real batch script
on the quickstart's task. It then checks and prints: every step was applied once, from samples of the weights that
`rl.lag` says; and how far both runs' metrics and held-out accuracy are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.slurm import scenarios  # noqa: E402
from tests.slurm.scenarios import TINY, Job, processes  # noqa: E402

scenarios.DEADLINE_S = 4 * 3600
CONFIG = ROOT / "examples/quickstart/quickstart.yaml"
OPTIONS: list[object] = [
    *("--parallel.tensor", 1, "--parallel.sequence_parallel", "false", "--parallel.max_tokens_per_microbatch", 4096),
    *("--sampling.num_samples", 8, "--sampling.max_new_tokens", 160, "--rollout.max_model_len", 256),
    *("--rl.prompts_per_step", 16, "--rl.optim.lr", 1e-3, "--rl.checkpoint.every_steps", 5, "--loss.kl_coef", 0.02),
    *("--rollout.health_timeout_s", 30, "--rollout.samples_per_request", 4),
]


def t1(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_t1", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def prepare(work: Path) -> None:
    """The quickstart's task, and its model after fine-tuning."""
    t1("quickstart-data", "--out", work / "task")
    t1("sft", "--config", CONFIG, "--run_dir", work / "tuned", "--model.hf_path", work / "task/model", "--data.sft",
       work / "task/sft.jsonl", "--parallel.nproc_per_node", 1)  # fmt: skip
    for name in ("alone", "disturbed"):
        shutil.copytree(work / "tuned/sft/hf", work / name / "model")
        shutil.copy(work / "task/rl.jsonl", work / name)


def begin(folder: Path, steps: int, lag: int) -> Job:
    env = {"VLLM_NODES": 1, "RANKS": 2, "SERVERS_PER_NODE": 2, "RESTARTS": 99}
    options = ["--config", TINY, *OPTIONS, "--rl.steps", steps, "--rl.lag", lag]
    return scenarios.submit(folder, "rl.sh", *options, nodes="2", env=env)


BLOWS: dict[str, tuple[int, tuple[str, ...], int]] = {
    "trainer rank": (3, ("python", "megatron_t1 rl"), signal.SIGKILL),
    "server": (2, ("python", "vllm.entrypoints", "--port"), signal.SIGKILL),
    "frozen server": (1, ("python", "vllm.entrypoints", "--port"), signal.SIGSTOP),
    "grader": (3, ("python", "megatron_t1.reward.processes.worker"), signal.SIGKILL),
    "t1 serve": (1, ("python", "megatron_t1 serve"), signal.SIGKILL),
    "requeue": (1, (), 0),
    "stop": (1, (), signal.SIGUSR1),
}
"""How often in a round, words of the victim's command line (none: the job itself), signal."""


def strike(job: Job, kind: str, chance: random.Random) -> bool:
    """Whether there was something to hit."""
    _, words, number = BLOWS[kind]
    if kind == "requeue":
        return subprocess.run(["scontrol", "requeue", job.id]).returncode == 0
    if kind == "stop":
        return subprocess.run(["scancel", "--signal=USR1", "--batch", job.id]).returncode == 0
    found = [pid for pid in processes(*words) if not {"srun", "bash"} & {Path(executable(pid)).name}]
    if not found:
        return False
    os.kill(chance.choice(found), number)
    return True


def executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return "srun"


def disturb(job: Job, chance: random.Random, pause_s: float, steps: int) -> Counter[str]:
    """Kills something every `pause_s` seconds on average until the job has ended."""
    done: Counter[str] = Counter()
    round_ = [kind for kind, (number, *_) in BLOWS.items() for _ in range(number)]
    coming: list[str] = []
    began = len(job.steps())
    while job.show()["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
        time.sleep(chance.expovariate(1 / pause_s))
        # At least a step between two blows: it is the loop that is tried, not the start.
        count = len(job.steps())
        began = min(began, count)  # a trainer that is started again goes back to its checkpoint
        if count in (began, steps) or job.show()["JobState"] != "RUNNING":
            continue
        coming = coming or chance.sample(round_, len(round_))
        if strike(job, kind := coming[-1], chance):
            began = count
            done[coming.pop()] += 1
            print(f"step {began}: {kind}", flush=True)
    return done


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/rl/metrics.jsonl").read_text().splitlines()]


def verify(folder: Path, steps: int, lag: int) -> None:
    """Every step once, from the right number of samples, all of the right weights."""
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    for row in found:
        assert row["oldest_version"] == max(0, row["step"] - 1 - lag)
        assert row["num_samples"] == 128
        assert row["logprob_diff"] < 1e-3 or lag, "samples of other weights would show here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=2, help="mean seconds between two blows")
    parser.add_argument("--lag", type=int, default=0, help="rl.lag of both runs")
    parser.add_argument("--inside", action="store_true", help="(already on the emulated cluster)")
    args = parser.parse_args()
    if not args.inside:
        args.work.mkdir(parents=True)
        prepare(args.work)
        cluster = Path(__file__).with_name("cluster.sh")
        words = [*sys.argv, "--inside"]
        raise SystemExit(subprocess.run(["bash", cluster, "-n", "2", sys.executable, *words]).returncode)
    alone = begin(args.work / "alone", args.steps, args.lag)
    assert alone.end()["JobState"] == "COMPLETED", alone.text()
    disturbed = begin(args.work / "disturbed", args.steps, args.lag)
    blows = disturb(disturbed, random.Random(args.seed), args.pause, args.steps)
    assert disturbed.end()["JobState"] == "COMPLETED", disturbed.text()
    for folder in (args.work / "alone", args.work / "disturbed"):
        verify(folder, args.steps, args.lag)
    one, other = rows(args.work / "alone"), rows(args.work / "disturbed")
    same = sum(a["loss"] == b["loss"] and a["reward"] == b["reward"] for a, b in zip(one, other, strict=True))
    print(f"blows: {dict(blows)}; job restarts: {disturbed.restarts()}")
    print(f"steps with the same loss and reward, to the last bit: {same} of {args.steps}")
    for name in ("alone", "disturbed"):
        print(name, "held out:", t1(
            "evaluate", "--config", CONFIG, "--run_dir", args.work / name / "evaluation", "--rollout.num_servers", 1,
            "--model.hf_path", args.work / name / "run/rl/hf", "--data.heldout", args.work / "task/heldout.jsonl",
        ).strip())  # fmt: skip


if __name__ == "__main__":
    main()
