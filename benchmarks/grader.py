"""How fast a step's worth of responses is graded, against math-verify alone, and what kills cost.

    python -m benchmarks.grader [--responses 2048] [--workers 2] [--out benchmarks/grader.md]

A step: 32 MATH500 problems with 64 responses each, every one several thousand characters of solution text before its
box; 40% give the gold in one of four spellings, the others another problem's answer; 5% are hostile inputs. math-verify
runs the same texts as its users run it: `verify(parse(gold), parse(response))` in one process a core, timeouts on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import random
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_t1.grade import pair_from_row
from megatron_t1.reward.score import RewardConfig, Scorer
from megatron_t1.types import Prompt, Reward, Sample

DATA = Path(__file__).parents[1] / "tests" / "data" / "grader"
BOMB = r"\int_0^1" + "|x+" * 120 + "x" + "|" * 120


def _rows(name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
    for row in rows:
        if generator := row.get("gen"):
            row["prediction"] = generator["pre"] + generator["rep"] * generator["n"] + generator["post"]
    return rows


def step(num_responses: int, hostile_share: float, bomb_share: float) -> list[dict[str, Any]]:
    """Rows of one step's responses, shuffled, the same in every run."""
    generator = random.Random(2025)
    problems = generator.sample(_rows("math500"), 32)
    solutions = [
        row["prediction"] for row in _rows("cases") if row["source"].startswith("PRM800K") and row["mode"] == "response"
    ]
    hostile = [row for row in _rows("adversarial") if row["mode"] == "response"]
    spellings = (
        lambda a: a,
        lambda a: a.replace("\\frac", "\\dfrac"),
        lambda a: f"x = {a}",
        lambda a: a.replace(" ", "\\, "),
    )
    rows: list[dict[str, Any]] = []
    for i in range(num_responses):
        problem, chance = problems[i % 32], generator.random()
        thinking = "\n\nWait, let me check. ".join(generator.choice(solutions) for _ in range(generator.randint(4, 12)))
        thinking = thinking.replace("\\boxed", "")
        answer = problem["answer"] if generator.random() < 0.4 else generator.choice(problems)["answer"]
        text = f"{thinking}</think> The answer is $\\boxed{{{generator.choice(spellings)(answer)}}}$."
        if chance < bomb_share:
            text = thinking + f"</think> \\boxed{{{BOMB}}}"
        elif chance < bomb_share + hostile_share:
            text = generator.choice(hostile)["prediction"]
        rows.append({"id": i, "gold": problem["answer"], "prediction": text, "question": problem["problem"]})
    return rows


def _math_verify(row: dict[str, Any]) -> tuple[float, float]:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    started, cpu = time.perf_counter(), time.process_time()
    verify(parse("$" + row["gold"] + "$"), parse(row["prediction"]))
    return time.perf_counter() - started, time.process_time() - cpu


def time_math_verify(rows: list[dict[str, Any]], workers: int) -> tuple[float, float, list[float]]:
    """(wall seconds, CPU seconds, wall seconds of each)."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_math_verify, rows[:8], chunksize=1)  # imports
        started = time.perf_counter()
        seconds = pool.map(_math_verify, rows, chunksize=8)
        return time.perf_counter() - started, sum(cpu for _, cpu in seconds), [wall for wall, _ in seconds]


def time_ours(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Times of a step that is awaited all at once, as the rollout does it."""
    pairs = [pair_from_row(row) for row in rows]

    async def one(scorer: Scorer, prompt: Prompt, sample: Sample) -> tuple[Reward, float]:
        return await scorer.score(prompt, sample), time.perf_counter()

    async def everything(scorer: Scorer) -> list[tuple[Reward, float]]:
        return await asyncio.gather(*(one(scorer, *pair) for pair in pairs))

    with Scorer(RewardConfig(num_workers=workers, tasks_per_worker=10**6)) as scorer:  # a dead grader's CPU is lost
        scorer.score_all(pairs[:8])  # start-up
        process = psutil.Process()
        before = sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))
        started = time.perf_counter()
        done = asyncio.run(everything(scorer))
        after = sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))
        finished = [at - started for _, at in done]
        others = [at - started for reward, at in done if reward.outcome != "timeout"]
        return {
            "wall": max(finished),
            "others": len(others) / max(others),
            "cpu": after - before,
            "seconds": [reward.seconds for reward, _ in done],
            "kills": scorer.num_kills,
        }


def _row(name: str, wall: float, cpu: float, seconds: list[float], others: float | None = None, kills: int = 0) -> str:
    ordered, rate = sorted(seconds), len(seconds) / wall
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    median_ms = statistics.median(ordered) * 1e3
    a_cpu_second = "-" if kills else f"{len(seconds) / cpu:,.0f}"
    return (
        f"| {name} | {rate:,.0f} | {others or rate:,.0f} | {a_cpu_second} | {median_ms:.1f} | {p99 * 1e3:.0f} | "
        f"{ordered[-1]:.2f} | {kills} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = [
        "| grader | verdicts/s | without the killed | a CPU second | p50 ms | p99 ms | worst s | kills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, hostile, bombs in (
        ("honest only", 0.0, 0.0),
        ("5% hostile", 0.05, 0.0),
        ("5% hostile, 1% need a kill", 0.05, 0.01),
    ):
        table.append(_row(f"ours, {name}", **time_ours(step(args.responses, hostile, bombs), args.workers)))
        print(table[-1], flush=True)
    for name, hostile in (("honest only", 0.0), ("5% hostile", 0.05)):
        wall, cpu, seconds = time_math_verify(step(args.responses, hostile, 0.0), args.workers)
        table.append(_row(f"math-verify alone, {name}", wall, cpu, seconds))
        print(table[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
