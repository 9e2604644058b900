"""What asking ahead gains and costs: seconds a step, and accuracy, at several `rl.lag`, on the quickstart's task.

    make quickstart                                             # once: the fine-tuned model and the questions
    python -m benchmarks.lag speed --out runs/lag               # one trainer process and one server, a core each
    python -m benchmarks.lag accuracy --out runs/lag --seeds 3  # held-out accuracy against steps and seconds
    python -m benchmarks.lag refill --out runs/lag --seeds 3    # rl.refill: held-out accuracy against tokens

`speed` runs lag 0 and 1 in turns. Trainer and server are held to a core each, so that one does not take the other's
time. The others go on where they were left: finished runs are not made again. `refill` has four samples a prompt, so
that many groups are all right or all wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WARM_UP_STEPS = 3
RULES = {
    "on policy": {"rl.lag": 0},
    "lag 1": {"rl.lag": 1},
    "lag 1, token TIS": {"rl.lag": 1, "loss.importance": "token", "loss.ratio_max": 2},
    "lag 2, keep": {"rl.lag": 2, "rollout.pause_mode": "keep"},
    "lag 2, keep, token TIS": {
        "rl.lag": 2,
        "rollout.pause_mode": "keep",
        "loss.importance": "token",
        "loss.ratio_max": 2,
    },
}
REFILL = {
    "as asked": {},
    "as asked, twice the steps": {"rl.steps": 80},
    "refill 1": {"rl.refill": 1},
}


def t1(*words: object, core: int | None = None, **options) -> subprocess.Popen:
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    command = [*pinned, sys.executable, "-m", "megatron_t1", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finished(process: subprocess.Popen) -> None:
    if process.wait():
        raise RuntimeError(f"{process.args} ended with exit code {process.returncode}")


def options(base: Path, run_dir: Path, settings: dict[str, object]) -> list[object]:
    fixed = {
        "config": "examples/quickstart/quickstart.yaml",
        "run_dir": run_dir,
        "model.hf_path": base / "sft/hf",
        **{f"data.{name}": base / f"data/{file}.jsonl" for name, file in (("train", "rl"), ("heldout", "heldout"))},
    }
    return [word for name, value in {**fixed, **settings}.items() for word in (f"--{name}", value)]


@contextmanager
def server(base: Path, out: Path, settings: dict[str, object], core: int) -> Iterator[dict[str, object]]:
    serve = t1("serve", *options(base, out / "serve", settings), core=core, stdout=subprocess.PIPE, text=True)
    try:
        assert serve.stdout is not None
        urls, key = (serve.stdout.readline().split(":", 1)[1].strip() for _ in range(2))
        yield {"rollout.urls": urls, "rollout.key_file": key}
    finally:
        serve.terminate()
        serve.wait()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_seconds(run_dir: Path) -> list[float]:
    spans = json.loads((run_dir / "rl/trace.json").read_text().rstrip().rstrip(",") + "]")
    return [span["dur"] / 1e6 for span in spans if str(span.get("name")).startswith("step ")][WARM_UP_STEPS:]


def speed(base: Path, out: Path, steps: int, turns: int, extra: dict[str, object]) -> None:
    settings = {"rollout.num_servers": 1, "parallel.nproc_per_node": 1, "rl.steps": steps, **extra}
    shown: dict[str, list[float]] = {}
    idle: dict[str, list[tuple[float, float]]] = {}
    with server(base, out, settings, core=1) as given:
        for turn, (name, rule) in itertools.product(range(turns), list(RULES.items())[:2]):
            run_dir = out / "speed" / f"{name} {turn}"
            finished(t1("rl", *options(base, run_dir, {**settings, **given, **rule}), core=0))
            shown.setdefault(name, []).extend(step_seconds(run_dir))
            idle.setdefault(name, []).extend(
                (row["idle/trainer"], row["idle/servers"]) for row in rows(run_dir / "rl/metrics.jsonl")[WARM_UP_STEPS:]
            )
    print("| | s a step, median | trainer idle | server idle |\n|---|---|---|---|")
    for name, seconds in shown.items():
        shares = (f"{100 * statistics.mean(each):.0f}%" for each in zip(*idle[name], strict=True))
        print(f"| {name} | {statistics.median(seconds):.2f} | {' | '.join(shares)} |")
    before, after = (statistics.median(seconds) for seconds in shown.values())
    print(f"\nlag 1 is {before / after:.2f} times as fast")


def accuracy(base: Path, out: Path, rules: dict[str, dict], steps: int, seeds: int, extra: dict[str, object]) -> None:
    print("| | held out, by seed | mean | reward of the last 10 steps | median s a step | tokens |")
    print("|---|---|---|---|---|---|")
    for name, rule in rules.items():
        found, reward, seconds, tokens = [], [], [], []
        for seed in range(seeds):
            run_dir = out / f"{name} seed {seed}"
            settings = {"seed": seed, "rl.steps": steps, **extra, **rule}
            if not (run_dir / "rl/hf").exists():
                resumed = ["--resume"] if (run_dir / "rl/checkpoints").exists() else []
                finished(t1("rl", *options(base, run_dir, settings), *resumed))
            if not (summary := run_dir / "evaluate/after/heldout/summary.json").exists():
                words = options(base, run_dir, {**settings, "model.hf_path": run_dir / "rl/hf", "label": "after"})
                finished(t1("evaluate", *words, "--resume"))
            found.append(json.loads(summary.read_text())["pass_at_1"])
            metrics = rows(run_dir / "rl/metrics.jsonl")
            reward.append(statistics.mean(row["reward"] for row in metrics[-10:]))
            tokens.append(sum(row["num_response_tokens"] + row.get("refill/tokens", 0) for row in metrics))
            seconds += step_seconds(run_dir)
        listed = ", ".join(f"{value:.3f}" for value in found)
        means = f"{statistics.mean(found):.3f} | {statistics.mean(reward):.3f} | {statistics.median(seconds):.2f}"
        print(f"| {name} | {listed} | {means} | {statistics.mean(tokens):,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "accuracy", "refill"])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/lag"))
    parser.add_argument("--steps", type=int, help="of each run (speed: 20, the others: 40)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the runs")
    asked = parser.parse_args()
    extra = dict(each.split("=", 1) for each in asked.set)
    if asked.what == "speed":
        speed(asked.base, asked.out, asked.steps or 20, asked.turns, extra)
    elif asked.what == "accuracy":
        accuracy(asked.base, asked.out / "accuracy", RULES, asked.steps or 40, asked.seeds, extra)
    else:
        few = {"sampling.num_samples": 4, **extra}
        accuracy(asked.base, asked.out / "refill", REFILL, asked.steps or 40, asked.seeds, few)


if __name__ == "__main__":
    main()
