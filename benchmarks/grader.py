"""How fast a step's worth of responses is graded, against math-verify alone, and what kills cost.

    python -m benchmarks.grader [--responses 2048] [--workers 2] [--rounds 3]
    python -m benchmarks.grader --soak 100000

A step: 32 MATH500 problems with 64 responses each, every one several thousand characters of solution text before its
box; 40% give the gold in one of four spellings, the others another problem's answer; 5% are hostile inputs. math-verify
runs the same texts as its users run it: `verify(parse(gold), parse(response))` in one process a core, timeouts on. All
rows are measured in turns, `--rounds` times; medians are printed. No answer needs a kill; those of the third row are
made for it (tests/reward/burning.py).

`--soak N` grades N answers while graders are killed at random, and compares every verdict with the one computed alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import random
import statistics
import sys
import time
from typing import Any

import psutil

from megatron_t1.grade import pair_from_row
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.types import Prompt, Reward, Sample
from tests.reward.burning import BURNS
from tests.reward.cases import rows
from tests.reward.soak import soak


def step(num_responses: int, hostile_share: float, bomb_share: float) -> list[dict[str, Any]]:
    """Rows of one step's responses, shuffled, the same in every run."""
    generator = random.Random(2025)
    problems = generator.sample(rows("math500"), 32)
    solutions = [
        row["prediction"] for row in rows("cases") if row["source"].startswith("PRM800K") and row["mode"] == "response"
    ]
    hostile = [row for row in rows("adversarial") if row["mode"] == "response"]
    spellings = (
        lambda a: a,
        lambda a: a.replace("\\frac", "\\dfrac"),
        lambda a: f"x = {a}",
        lambda a: a.replace(" ", "\\, "),
    )
    kinds = ["bomb"] * round(bomb_share * num_responses) + ["hostile"] * round(hostile_share * num_responses)
    kinds += ["honest"] * (num_responses - len(kinds))
    generator.shuffle(kinds)
    made: list[dict[str, Any]] = []
    for i, kind in enumerate(kinds):
        problem = problems[i % 32]
        thinking = "\n\nWait, let me check. ".join(generator.choice(solutions) for _ in range(generator.randint(4, 12)))
        thinking = thinking.replace("\\boxed", "")
        answer = problem["answer"] if generator.random() < 0.4 else generator.choice(problems)["answer"]
        text = f"{thinking}</think> The answer is $\\boxed{{{generator.choice(spellings)(answer)}}}$."
        gold = problem["answer"]
        if kind == "bomb":
            gold = BURNS
        elif kind == "hostile":
            text = generator.choice(hostile)["prediction"]
        made.append({"id": i, "gold": gold, "prediction": text, "question": problem["problem"]})
    return made


def _math_verify(row: dict[str, Any]) -> tuple[float, float]:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    started, cpu = time.perf_counter(), time.process_time()
    verify(parse("$" + row["gold"] + "$"), parse(row["prediction"]))
    return time.perf_counter() - started, time.process_time() - cpu


def time_math_verify(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """The same times, without start-up."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_math_verify, rows[:8], chunksize=1)  # imports
        started = time.perf_counter()
        seconds = pool.map(_math_verify, rows, chunksize=8)
        wall = time.perf_counter() - started
        return {
            "wall": wall,
            "others": len(rows) / wall,
            "cpu": sum(cpu for _, cpu in seconds),
            "seconds": [each for each, _ in seconds],
            "kills": 0,
        }


def _cpu_s(process: psutil.Process) -> float:
    """CPU time of a process and its descendants."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:2])
    return total


def time_ours(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Times of a step that is awaited all at once, as the rollout does it."""
    pairs = [pair_from_row(row) for row in rows]

    async def one(scorer: Scorer, prompt: Prompt, sample: Sample) -> tuple[Reward, float]:
        return await scorer.score(prompt, sample), time.perf_counter()

    async def everything(scorer: Scorer) -> list[tuple[Reward, float]]:
        return await asyncio.gather(*(one(scorer, *pair) for pair in pairs))

    cfg = RewardConfig(num_workers=workers, tasks_per_worker=10**6)  # a dead grader's CPU is lost
    with Scorer(cfg, "tests.reward.burning") as scorer:
        scorer.score_all(pairs[:8])  # start-up
        process = psutil.Process()
        before = _cpu_s(process)
        started = time.perf_counter()
        done = asyncio.run(everything(scorer))
        after = _cpu_s(process)
        finished = [at - started for _, at in done]
        others = sorted(at - started for reward, at in done if reward.outcome != "timeout")
        most = int(0.99 * len(others))
        return {
            "wall": max(finished),
            "others": most / others[most - 1],
            "cpu": after - before,
            "seconds": [reward.seconds for reward, _ in done],
            "kills": scorer.num_kills,
        }


def _line(name: str, rounds: list[dict[str, Any]]) -> str:
    """The medians of a row's rounds."""
    a_cpu_second = [len(r["seconds"]) / r["cpu"] for r in rounds]
    columns = [
        [len(r["seconds"]) / r["wall"] for r in rounds],
        [r["others"] for r in rounds],
        a_cpu_second,
        [statistics.median(r["seconds"]) * 1e3 for r in rounds],
        [sorted(r["seconds"])[int(0.99 * (len(r["seconds"]) - 1))] * 1e3 for r in rounds],
        [max(r["seconds"]) for r in rounds],
    ]
    rate, others, cpu, p50, p99, worst = (statistics.median(column) for column in columns)
    kills = rounds[0]["kills"]
    return (
        f"| {name} | {rate:,.0f} | {others:,.0f} | {'-' if kills else f'{cpu:,.0f}'} | {p50:.1f} | {p99:.0f} | "
        f"{worst:.2f} | {kills} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0)
    args = parser.parse_args()
    if args.soak:
        report = soak(args.soak, num_workers=args.workers)
        print(
            f"{args.soak} answers in {report.seconds:.0f} s: {len(report.wrong)} wrong, {report.num_killed} processes "
            f"killed at random, {report.num_late} graders at their deadline, slowest answer {report.slowest_s:.1f} s"
        )
        sys.exit(bool(report.wrong))
    shares = {"honest only": (0.0, 0.0), "5% hostile": (0.05, 0.0), "5% hostile, 1% need a kill": (0.05, 0.01)}
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for name, (hostile, bombs) in shares.items():
            made = step(args.responses, hostile, bombs)
            found.setdefault(f"ours, {name}", []).append(time_ours(made, args.workers))
            if not bombs:
                found.setdefault(f"math-verify alone, {name}", []).append(time_math_verify(made, args.workers))
        print(f"load {psutil.getloadavg()[0]:.1f}", file=sys.stderr)
    print(
        "| grader | verdicts/s | until 99% of the others are done | a CPU second | p50 ms | p99 ms | worst s | kills |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in sorted(found, reverse=True):
        print(_line(name, found[name]))


if __name__ == "__main__":
    main()
