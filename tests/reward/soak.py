"""Thousands of answers through graders that are killed at random: every verdict against the one computed alone.

Half of the answers are numbers of which no two are alike, so that a verdict booked on another answer is seen; the
others are the shipped cases, hostile and huge texts, long thinking in two languages, and tasks that never end.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_t1.reward import grading
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.types import Prompt, Reward, Sample
from tests.reward.burning import BURNS
from tests.reward.cases import pair, rows

Verdict = tuple[str, str | None, dict[str, str]]
"""(outcome, extracted, penalties)"""


@dataclass
class Report:
    """What a soak showed."""

    num_answers: int = 0
    wrong: list[tuple[str, Verdict, Verdict]] = field(default_factory=list)
    """(gold, verdict, the one computed alone)"""
    num_killed: int = 0
    """Graders and zygotes killed at random."""
    num_late: int = 0
    """Graders killed at their deadline."""
    seconds: float = 0.0
    slowest_s: float = 0.0


def _answers(num_answers: int, generator: random.Random) -> Iterator[tuple[Prompt, Sample]]:
    cases = [case for case in rows("cases") if case["mode"] != "mc"]
    hostile = [case for case in rows("adversarial") if case["mode"] != "mc"]
    quality = rows("textquality")
    words = ["so", "we", "check", "the", "sum", "again", "and", "find", "that", "it"]
    for i in range(num_answers):
        kind = generator.random()
        right = generator.random() < 0.5
        thinking = " ".join(generator.choices(words, k=generator.choice((20, 500)))) + "</think>"
        number = pair(str(i), rf"{thinking} \boxed{{{i if right else i + num_answers}}}")
        if kind < 0.5:
            yield number
        elif kind < 0.9:
            case = generator.choice(cases)
            yield pair(case["gold"], case["prediction"], case["mode"])
        elif kind < 0.94:
            case = generator.choice(hostile)
            yield pair(case["gold"], case["prediction"], case["mode"])
        elif kind < 0.97:
            yield pair("0", generator.choice(quality)["text"])
        elif kind < 0.985:
            steps = "".join(f"因此再检查一次第{generator.randrange(9999)}步的结果。" for _ in range(2200))
            yield pair(str(i), f"{' '.join(words * 400)}{steps}</think> \\boxed{{{i}}}")
        elif kind < 0.9995:
            yield pair(str(i), f"{' '.join(generator.choices(words, k=60_000))}</think> \\boxed{{{i}}}")
        else:
            yield pair(BURNS, number[1].text)


def _alone(scorer: Scorer, prompt: Prompt, sample: Sample) -> Verdict:
    messages = list(grading.grade_task(scorer.task(prompt, sample)))
    verdict = messages[-1]["verdict"]
    if prompt.gold == BURNS:
        return "timeout", verdict["extracted"], messages[0]["penalties"]
    return verdict["outcome"], verdict["extracted"], messages[0]["penalties"]


def _as_verdict(reward: Reward) -> Verdict:
    return reward.outcome, reward.extracted, reward.penalties


def soak(num_answers: int, seed: int = 0, num_workers: int = 2, **config: Any) -> Report:
    """Grades so many answers in a storm of SIGKILLs; kills never come faster than graders can work."""
    report, stop = Report(num_answers), threading.Event()
    started = time.monotonic()
    with Scorer(RewardConfig(num_workers=num_workers, **config), "tests.reward.burning") as scorer:

        def killer() -> None:
            generator, graded = random.Random(seed), 0
            while not stop.wait(generator.uniform(0.02, 0.2)):
                pids = scorer.pids()
                if len(pids) > 1 and scorer.outcomes.total() >= graded + 20:
                    graded = scorer.outcomes.total()
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[0] if generator.random() < 0.03 else generator.choice(pids[1:]), signal.SIGKILL)
                        report.num_killed += 1

        thread = threading.Thread(target=killer)
        thread.start()
        expected: list[tuple[str, Verdict]] = []

        def answers() -> Iterator[tuple[Prompt, Sample]]:
            for prompt, sample in _answers(num_answers, random.Random(seed)):
                expected.append((prompt.gold, _alone(scorer, prompt, sample)))
                yield prompt, sample

        try:
            for i, reward in enumerate(scorer.score_iter(answers())):
                gold, alone = expected[i]
                report.slowest_s = max(report.slowest_s, reward.seconds)
                if _as_verdict(reward) != alone:
                    report.wrong.append((gold, _as_verdict(reward), alone))
        finally:
            stop.set()
            thread.join()
        report.num_late = scorer.num_kills
    report.seconds = time.monotonic() - started
    return report
