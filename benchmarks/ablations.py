"""The paper's ablations at the quickstart's size: rows x seeds from one fine-tuned model, and a table with intervals.

    python -m benchmarks.ablations                                         # all rows of examples/ablations, 3 seeds
    python -m benchmarks.ablations --rows k4 no_penalties --seeds 0 1 --steps 10 --out runs/try

    data, fine-tuned model, servers: once; then, seed by seed, every row by `t1 rl`, measured by the servers

What is finished is not run again, and a run that was cut goes on: the same command completes the table, which is
written after every run. Runs of other settings (each one's config.yaml has them) are refused, not shown as these;
--steps alone may grow. A row that sets `data.sft` gets a fine-tuning of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from megatron_t1.cli.options import read
from megatron_t1.config import Config
from megatron_t1.trackers import flat

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "examples/ablations"
BASE = ROOT / "examples/quickstart/quickstart.yaml"
SIZE = {
    # 256 samples a step as there, in groups of 32 and not 8: K = 64 then costs two such steps, not eight.
    "rl.prompts_per_step": 8,
    "sampling.num_samples": 32,
}
OWN = {"run_dir", "resume", "model.hf_path", "data.train", "data.heldout", "rollout.urls", "rollout.key_file"}
"""Settings that follow from --out."""
GROWS = {"rl.steps", "rl.measure_every"}
LAST = 10
"""Steps at the end whose mean stands for a run's lengths, penalties and entropy."""
COLUMNS = {
    "tokens": "response_tokens_mean",
    "cut": "share_cut",
    "penalized": "penalized",
    "entropy": "entropy",
    "tokens of equal groups": "tokens_all_equal",
}


def main() -> int:
    names = sorted(path.stem for path in ROWS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sft_steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    out, rows = args.out, ["base", *(name for name in args.rows if name != "base")]
    data = out / "data"
    files = {name: sft_file(name) for name in rows}
    others = [line for file in {*files.values()} for line in differences(*sft_options(out, file, args.sft_steps))]
    for name in rows:
        for seed in args.seeds:
            others += differences(*rl_options(out, name, seed, args.steps, files[name]))
    if others:
        sys.exit("\n".join([f"{out} holds runs of other settings; take another --out, or remove them:", *others]))
    if not (data / "sft_right_only.jsonl").exists():
        t1("quickstart-data", {"out": data})
        write_right_only(data)
    missing = [
        (seed, name) for seed in args.seeds for name in rows if not result_file(out, name, seed, args.steps).exists()
    ]
    failed = []
    if missing:
        for file in sorted({*files.values()}):
            if not start(out, file).exists():
                t1("sft", *sft_options(out, file, args.sft_steps))
        with served(out, start(out, files["base"])) as servers:
            for seed, name in missing:
                try:
                    t1("rl", *rl_options(out, name, seed, args.steps, files[name]), servers)
                except subprocess.CalledProcessError:
                    failed.append(f"{name}, seed {seed}")
                write_table(out, rows, args.steps)
    print(write_table(out, rows, args.steps) + "".join(f"failed: {each}\n" for each in failed))
    return bool(failed)


def write_table(out: Path, rows: list[str], steps: int) -> str:
    text = table({name: results(out, name, steps) for name in rows})
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def words(*options: dict[str, Any]) -> list[str]:
    return [part for each in options for option, value in each.items() for part in (f"--{option}", str(value))]


def command(name: str, *options: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "megatron_t1", name, *words(*options)]


def t1(name: str, *options: dict[str, Any]) -> None:
    subprocess.run(command(name, *options), check=True)


def sft_file(row: str) -> str:
    settings = yaml.safe_load((ROWS / f"{row}.yaml").read_text(encoding="utf-8"))
    return Path(settings.get("data", {}).get("sft", "sft.jsonl")).name


def write_right_only(data: Path) -> None:
    """Of sft.jsonl the chains whose first try was right."""
    with (data / "sft_right_only.jsonl").open("w", encoding="utf-8") as file:
        for line in (data / "sft.jsonl").open(encoding="utf-8"):
            response = json.loads(line)["response"]
            if ", yes. " in response and ", no. " not in response:
                file.write(line)


def start(out: Path, file: str) -> Path:
    return out / Path(file).stem / "sft/hf"


def sft_options(out: Path, file: str, steps: int) -> list[dict[str, Any]]:
    own = {"run_dir": out / Path(file).stem, "model.hf_path": out / "data/model", "data.sft": out / "data" / file}
    # By steps and not by epochs, which would give a smaller file fewer of them.
    return [{"config": BASE}, own, {"sft.max_steps": steps, "sft.epochs": 100, "resume": "true"}]


def rl_options(out: Path, row: str, seed: int, steps: int, file: str) -> list[dict[str, Any]]:
    asked = {
        "run_dir": out / row / f"seed_{seed}",
        "seed": seed,
        "model.hf_path": start(out, file),
        "data.train": out / "data/rl.jsonl",
        "data.heldout": out / "data/heldout.jsonl",
        "rl.steps": steps,
        "rl.measure_every": steps,
        "resume": "true",
    }
    return [{"config": BASE}, SIZE, {"config": ROWS / f"{row}.yaml"}, asked]


def differences(*options: dict[str, Any]) -> list[str]:
    """What the run that lies where these options would put theirs was made with instead."""
    asked = read(Config, words(*options))
    file = Path(asked.run_dir) / "config.yaml"
    if not file.exists():
        return []
    was, new = (dict(flat(asdict(each))) for each in (read(Config, ["--config", str(file)]), asked))
    for each in (was, new):
        each["data.sft"] = each["data.sft"] and Path(each["data.sft"]).name
    return [
        f"  {asked.run_dir}: {name} was {was.get(name)}, and is {new.get(name)}"
        for name in sorted((was.keys() | new.keys()) - OWN - GROWS)
        if was.get(name) != new.get(name)
    ]


@contextmanager
def served(out: Path, model: Path) -> Iterator[dict[str, str]]:
    """Servers for all runs, each of which pushes its weights into them; the options that name them."""
    own = {"run_dir": out / "serve", "model.hf_path": model}
    with subprocess.Popen(command("serve", {"config": BASE}, own), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = dict(line.strip().split(": ", 1) for line in (process.stdout.readline(), process.stdout.readline()))
        try:
            yield said
        finally:
            process.terminate()


def result_file(out: Path, row: str, seed: int, step: int) -> Path:
    return out / row / f"seed_{seed}/evaluate/step_{step:06d}/heldout/summary.json"


def results(out: Path, row: str, steps: int) -> dict[int, dict[str, float]]:
    """Seed -> figures, of the runs that are finished."""
    found = {}
    for run_dir in sorted((out / row).glob("seed_*")):
        seed = int(run_dir.name.removeprefix("seed_"))
        if (path := result_file(out, row, seed, steps)).exists():
            lines = (run_dir / "rl/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            last = [line for line in map(json.loads, lines) if line["step"] <= steps][-LAST:]
            figures = {title: float(np.mean([row[name] for row in last])) for title, name in COLUMNS.items()}
            figures["tokens of equal groups"] /= float(np.mean([row["num_response_tokens"] for row in last]))
            figures["start"] = json.loads(result_file(out, row, seed, 0).read_text(encoding="utf-8"))["pass_at_1"]
            accuracy = json.loads(path.read_text(encoding="utf-8"))["pass_at_1"]
            found[seed] = {"accuracy": accuracy, **figures}
    return found


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: means over seeds, Student's t intervals; differences to `base` are paired by seed."""
    titles = ["start", *COLUMNS]
    lines = [
        f"| row | seeds | held-out pass@1 (95%) | against base (95%) | {' | '.join(titles)} |",
        "|---" * (4 + len(titles)) + "|",
    ]
    for name, of_seeds in found.items():
        if not of_seeds:
            continue
        accuracy = {seed: figures["accuracy"] for seed, figures in of_seeds.items()}
        base = {seed: figures["accuracy"] for seed, figures in found["base"].items()}
        shared = sorted(accuracy.keys() & base.keys())
        against = interval([accuracy[seed] - base[seed] for seed in shared], "+.3f") if name != "base" else ""
        means = [f"{np.mean([figures[title] for figures in of_seeds.values()]):.3g}" for title in titles]
        cells = [name, len(of_seeds), interval(list(accuracy.values()), ".3f"), against, *means]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def interval(values: list[float], form: str) -> str:
    """Mean and Student's t interval of the mean; no interval of fewer than two values."""
    mean = f"{np.mean(values):{form}}" if values else ""
    if len(values) < 2:
        return mean
    if np.ptp(values) == 0:  # no spread, no test
        return f"{mean} (all the same)"
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return f"{mean} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    sys.exit(main())
