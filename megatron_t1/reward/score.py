"""From a prompt and a sample to a Reward: the verdict, the penalties, and T1's rule that joins them.

All work (extraction, comparison, penalties) happens in the grader processes, so an asyncio loop that scores samples
while others are generated only waits. `Scorer` owns them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_t1.files import storable
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.penalties import Response, find_penalties, mean_and_worst_nll
from megatron_t1.reward.processes.grader import Graded
from megatron_t1.reward.processes.pool import Pool
from megatron_t1.types import FinishReason, Prompt, Reward, Sample, Verdict
from megatron_t1.warn import warn

_FAILURES = ("no_answer", "timeout", "crash")
MAX_RESPONSE_CHARS = 4_000_000
"""Longer responses are refused unread; 128k tokens of a model are 600,000 characters."""


class Scorer:
    """Grades samples in killable processes. Use as a context manager.

    Any number of `score` may be awaited at once, on any event loop; nothing a sample contains can hang, crash or take
    over the calling process. A sample whose grader had to be killed has outcome `timeout` (value 0) and keeps its
    penalties.
    """

    def __init__(
        self,
        cfg: RewardConfig,
        grading: str = "megatron_t1.reward.grading",
        explain: bool = False,
        hidden_ids: Sequence[int] = (),
    ):
        """`grading`: the module with `grade_task`, `prepare` and `warm_up` that the processes run; `explain`: reasons
        say what was read and by which rules gold and answer are equal or not; `hidden_ids`: tokens that leave no
        text."""
        self.cfg = cfg
        self._hidden_ids = np.array(hidden_ids, np.int64)
        by_ending = tuple(name for name in cfg.penalties.enabled if name in ("repetition", "overlong"))
        self._by_ending = replace(cfg.penalties, enabled=by_ending)
        self._without_logprobs = False  # and said so
        self._explain = explain
        self.outcomes: Counter[str] = Counter()
        """Samples graded so far by outcome, plus one count a penalty (`penalty/repetition`, ...)."""
        self._failures_in_a_row = 0
        num_workers = cfg.num_workers or min(8, os.cpu_count() or 1)
        self._pool = Pool(grading, num_workers, cfg.deadline_s, cfg.memory_mb << 20, cfg.tasks_per_worker)
        self._deciding = json.dumps(cfg.deciding())

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the grader processes."""
        self._pool.close()

    @property
    def num_kills(self) -> int:
        """Graders killed at their deadline so far."""
        return self._pool.num_kills

    @property
    def num_lost(self) -> int:
        """Graders that were stuck, or died by themselves or by another hand, so far."""
        return self._pool.num_lost

    def pids(self) -> list[int]:
        """Its live processes, the zygote's first."""
        return self._pool.pids()

    async def score(self, prompt: Prompt, sample: Sample) -> Reward:
        """The reward of one sample. It never raises for what the sample contains."""
        return self._reward(await asyncio.wrap_future(self._submit(prompt, sample)), sample.finish_reason)

    def score_iter(self, pairs: Iterable[tuple[Prompt, Sample]], window: int = 1024) -> Iterator[Reward]:
        """Rewards in the order of the pairs; at most `window` are in flight."""
        futures: deque[tuple[Future[Graded], FinishReason]] = deque()

        def first() -> Reward:
            future, finish_reason = futures.popleft()
            return self._reward(future.result(), finish_reason)

        for prompt, sample in pairs:
            futures.append((self._submit(prompt, sample), sample.finish_reason))
            if len(futures) >= window:
                yield first()
        while futures:
            yield first()

    def score_all(self, pairs: Iterable[tuple[Prompt, Sample]]) -> list[Reward]:
        """Rewards in the order of the pairs."""
        return list(self.score_iter(pairs))

    def check_golds(self, golds: Iterable[str]) -> Iterator[str | None]:
        """Why each answer cannot serve as a gold, None when it can; in order."""
        futures = [self._pool.submit({"gold_to_check": gold}, f"the gold {gold[:40]!r}") for gold in golds]
        for future in futures:
            graded = future.result()
            yield graded.messages[-1]["problem"] if graded.ending == "done" else f"the grader ended in {graded.ending}"

    def _submit(self, prompt: Prompt, sample: Sample) -> Future[Graded]:
        if len(sample.text) > MAX_RESPONSE_CHARS:
            refused: Future[Graded] = Future()
            verdict = Verdict("no_answer", None, f"a response of more than {MAX_RESPONSE_CHARS} characters")
            refused.set_result(Graded([{"penalties": {}, "answer": None, "verdict": asdict(verdict)}], "done"))
            return refused
        return self._pool.submit(self.task(prompt, sample), f"an answer to {prompt.id}")

    def task(self, prompt: Prompt, sample: Sample) -> dict[str, Any]:
        """What a grader is told of a sample."""
        own = self.cfg.penalties
        known = len(sample.logprobs) > 0
        if not known and "perplexity" in own.enabled and not self._without_logprobs:
            self._without_logprobs = True
            warn("the penalty `perplexity` is left out: there are no logprobs with these responses, only their text")
        return {
            "gold": str(prompt.gold),
            "mode": prompt.mode,
            "choices": prompt.choices,
            "prompt": f"{prompt.before}\n{prompt.text}".strip() or None,
            "text": sample.text,
            "token_ids": sample.token_ids.tolist() if own.max_ngram_repeats else (),
            "finish_reason": sample.finish_reason,
            "num_hidden_tokens": int(np.isin(sample.token_ids[:-1], self._hidden_ids).sum()),
            "nll": mean_and_worst_nll(sample.logprobs, own.nll_window) if known else None,
            "question": prompt.text,
            "explain": self._explain,
            "config": self._deciding,
        }

    def _reward(self, graded: Graded, finish_reason: FinishReason) -> Reward:
        first = graded.messages[0] if graded.messages else {"penalties": {}, "answer": None}
        penalties = {name: storable(reason) for name, reason in first["penalties"].items()}
        # How it ended is known also where no grader came to read it.
        penalties |= find_penalties(self._by_ending, Response(text="", finish_reason=finish_reason))
        if graded.ending == "done":
            verdict = Verdict(**graded.messages[-1]["verdict"])
        elif graded.ending == "timeout":
            verdict = Verdict("timeout", first["answer"], f"killed after {graded.seconds:.1f} s")
        else:
            verdict = Verdict("crash", first["answer"], "every grader that tried it died")
        correct = verdict.outcome == "correct"
        self._count(verdict.outcome, penalties)
        return Reward(
            value=-1.0 if penalties else float(correct if verdict.share is None else verdict.share),
            correct=correct,
            outcome=verdict.outcome,
            extracted=None if verdict.extracted is None else storable(verdict.extracted),
            reason=storable(verdict.reason),
            penalties=penalties,
            seconds=graded.seconds,
        )

    def _count(self, outcome: str, penalties: dict[str, str]) -> None:
        self.outcomes[outcome] += 1
        self.outcomes.update(f"penalty/{name}" for name in penalties)
        self._failures_in_a_row = self._failures_in_a_row + 1 if outcome in _FAILURES else 0
        if self._failures_in_a_row and self._failures_in_a_row % self.cfg.alarm_after == 0:
            warn(
                f"the last {self._failures_in_a_row} samples all ended in no_answer, timeout or crash (so far: "
                f"{dict(self.outcomes)}): check that the prompt asks for \\boxed{{}} and closes its thinking, and look "
                "at `reason` in the samples' rewards"
            )
