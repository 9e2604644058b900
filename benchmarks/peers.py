"""TRL's GRPOTrainer beside ours on the quickstart's model and questions, in turns: seconds a step, accuracy, 3 seeds.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0+cpu transformers==5.19.0
    make quickstart
    python -m benchmarks.peers --python /tmp/trl/bin/python [--quickstart runs/quickstart] [--out runs/peers]

Both start from the quickstart's fine-tuned model with the same prompts and samples a step, temperature, length, rewards
and learning rate, on the same two cores, in two processes (ours: two trainer ranks and a vLLM server, taking turns),
and write a snapshot every ten steps, whose times are the clock. The snapshots of both are measured by the same program.
A run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.ablations import BASE, ROOT, command, interval

EVERY = 10
"""Steps between snapshots."""
SCRIPT = ROOT / "benchmarks/peers_trl.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has TRL")
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="a run that is over")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    model, data = asked.quickstart / "sft/hf", asked.quickstart / "data"
    for seed in asked.seeds:
        for name in ("ours", "trl"):
            snapshots = snapshots_of(asked.out, name, seed)
            if not (snapshots / f"step_{asked.steps:06d}").exists():
                if name == "ours":
                    run(ours(model, data, asked.out / name / f"seed_{seed}", seed, asked.steps))
                else:
                    options = ["--seed", seed, "--steps", asked.steps, "--every", EVERY]
                    ranks = [asked.python, "-m", "torch.distributed.run", "--nproc_per_node", 2]
                    run([*ranks, SCRIPT, "train", model, data / "rl.jsonl", snapshots.parent, *options])
            if not (snapshots / "accuracy.json").exists():
                run([asked.python, SCRIPT, "evaluate", snapshots, data / "heldout.jsonl"])
    print(table(asked.out, asked.seeds, asked.steps))


def ours(model: Path, data: Path, run_dir: Path, seed: int, steps: int) -> list[str]:
    return command(
        "rl",
        {"config": BASE},
        {
            "run_dir": run_dir,
            "seed": seed,
            "model.hf_path": model,
            "data.train": data / "rl.jsonl",
            "data.heldout": data / "heldout.jsonl",
            # TRL can't apply `perplexity`, and is asked for no checkpoints.
            "reward.penalties.enabled": "[repetition,overlong,malformed]",
            "rl.checkpoint.every_steps": steps,
            "rl.steps": steps,
            "rl.snapshot_every": EVERY,
        },
    )


def run(words: list[object]) -> None:
    # One thread a process: at this size more are slower, for both.
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in words], env=own, check=True)


def snapshots_of(out: Path, name: str, seed: int) -> Path:
    return out / name / f"seed_{seed}" / ("rl/snapshots" if name == "ours" else "snapshots")


def clock(snapshots: Path, steps: int) -> list[float]:
    """Seconds since the first snapshot at which each was there; the first is left out, with what only a start pays."""
    times = [
        (snapshots / f"step_{step:06d}/model.safetensors").stat().st_mtime for step in range(EVERY, steps + 1, EVERY)
    ]
    return [time - times[0] for time in times]


def table(out: Path, seeds: list[int], steps: int) -> str:
    """Markdown. At the same seconds: ours at the time of each of TRL's snapshots, both counted from the 10th step,
    interpolated between our snapshots."""
    numbers = list(range(EVERY, steps + 1, EVERY))
    found = {name: [snapshots_of(out, name, seed) for seed in seeds] for name in ("ours", "trl")}
    clocks = {name: np.array([clock(path, steps) for path in paths]) for name, paths in found.items()}
    accuracy = {
        name: np.array([list(json.loads((path / "accuracy.json").read_text()).values()) for path in paths])
        for name, paths in found.items()
    }
    a_step = {name: each[:, -1] / (steps - EVERY) for name, each in clocks.items()}
    lines = [
        "| seed | seconds a step, TRL | ours | TRL / ours |",
        "|---|---|---|---|",
        *(
            f"| {seed} | {theirs:.2f} | {own:.2f} | {theirs / own:.2f} |"
            for seed, theirs, own in zip(seeds, a_step["trl"], a_step["ours"], strict=True)
        ),
        "",
        "| step | held-out accuracy, TRL | ours, same step | difference | ours, same seconds | difference |",
        "|---|---|---|---|---|---|",
    ]
    for column, step in enumerate(numbers):
        theirs, own = accuracy["trl"][:, column], accuracy["ours"][:, column]
        rows = zip(clocks["trl"][:, column], clocks["ours"], accuracy["ours"], strict=True)
        by_then = np.array([np.interp(at, mine, each) for at, mine, each in rows])
        cells = [interval(list(theirs), ".3f"), interval(list(own), ".3f"), interval(list(own - theirs), "+.3f")]
        cells += [interval(list(by_then), ".3f"), interval(list(by_then - theirs), "+.3f")]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
