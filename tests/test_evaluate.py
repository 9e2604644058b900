"""Evaluation and inference scaling against a real vLLM server and the real grader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_t1 import evaluate as module
from megatron_t1.actors import Actors
from megatron_t1.data.template import Template
from megatron_t1.evaluate import EvaluateConfig, evaluate
from megatron_t1.reward.score import RewardConfig, Scorer
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.server import Servers
from megatron_t1.scaling import ScalingConfig, _thinking, measure
from megatron_t1.types import Group, Prompt, Sample

SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=16)
CFG = EvaluateConfig(sampling=SAMPLING)


@dataclass(frozen=True)
class CountingActors(Actors):
    """The real ones; they remember what was asked, and are interrupted once that are `max_questions`."""

    asked: list[str] = field(default_factory=list)
    max_questions: int = 99

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, seed: int) -> list[Group]:
        if len(self.asked) >= self.max_questions:
            raise KeyboardInterrupt
        self.asked.extend(prompt.id for prompt in prompts)
        return super().generate(prompts, sampling, seed)


@pytest.fixture(scope="module")
def template(tiny_dir: Path) -> Template:
    return Template(tiny_dir)


@pytest.fixture(scope="module")
def real(server: Servers, template: Template) -> Iterator[Actors]:
    with Scorer(RewardConfig()) as scorer, RolloutClient(server, template.tokenizer, vocab_size=320) as client:
        yield Actors(server, client, scorer)


def counting(real: Actors, max_questions: int = 99) -> CountingActors:
    return CountingActors(real.servers, real.client, real.scorer, max_questions=max_questions)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    monkeypatch.setattr(module, "_BLOCK", 2)
    return [Prompt(id=f"q{i}", text=f"q{i}", token_ids=np.arange(40 + i, 46 + i), gold="7") for i in range(5)]


def test_a_cut_evaluation_resumes_to_the_files_of_an_uncut_one(
    real: Actors, prompts: list[Prompt], tmp_path: Path
) -> None:
    whole = evaluate(CFG, counting(real), prompts, tmp_path, "whole", seed=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(CFG, counting(real, max_questions=4), prompts, tmp_path, "cut", seed=1)
    path = tmp_path / "cut/responses.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # and killed while writing the second block
    actors = counting(real)
    resumed = evaluate(CFG, actors, prompts, tmp_path, "cut", seed=1, resume=True)
    assert actors.asked == ["q2", "q3", "q4"]
    assert replace(resumed, label="whole") == whole

    def stored(label: str) -> list[dict]:
        found = [json.loads(line) for line in (tmp_path / label / "responses.jsonl").read_text().splitlines()]
        return [{**row, "reward": {**row["reward"], "seconds": 0}} for row in found]

    assert stored("cut") == stored("whole")
    assert [row["id"] for row in stored("cut")] == [f"q{i}" for i in range(5) for _ in range(2)]


def test_an_older_evaluation_is_not_taken_for_this_one(real: Actors, prompts: list[Prompt], tmp_path: Path) -> None:
    evaluate(CFG, counting(real), prompts[:2], tmp_path, "a", seed=1)
    again = counting(real)
    evaluate(CFG, again, prompts[:2], tmp_path, "a", seed=1)
    other_seed = counting(real)
    evaluate(CFG, other_seed, prompts[:2], tmp_path, "a", seed=2, resume=True)
    same = counting(real)
    evaluate(CFG, same, prompts[:2], tmp_path, "a", seed=2, resume=True)
    assert (again.asked, other_seed.asked, same.asked) == (["q0", "q1"], ["q0", "q1"], [])


def test_summary_counts_what_the_grader_said() -> None:
    def row(identity: str, correct: bool, finish: str = "stop") -> dict:
        outcome = "correct" if correct else "wrong"
        return {
            "id": identity,
            "reward": {"correct": correct, "outcome": outcome},
            "num_tokens": 10,
            "finish_reason": finish,
        }

    rows = [row("a", True), row("a", True), row("b", True), row("b", False, "length"), row("c", False), row("c", False)]
    result = module.summarize("x", rows)
    assert (result.num_questions, result.num_samples, result.pass_at_1) == (3, 2, 0.5)
    assert result.outcomes == {"correct": 3, "wrong": 3}
    assert (result.mean_tokens, result.share_cut) == (10, pytest.approx(1 / 6))
    low, high = result.interval
    assert low < 0.5 < high


def test_scaling_forces_an_answer_from_every_cut(
    real: Actors, template: Template, prompts: list[Prompt], tmp_path: Path
) -> None:
    # The answer is in the opening: exactly what was forced is right. A random model ends no thinking by itself.
    cfg = ScalingConfig(
        budgets=(4, 8, 16, 32), sampling=SAMPLING, answer_opening="</think>\\boxed{7}", max_answer_tokens=2
    )
    points = measure(cfg, real, template, prompts, tmp_path, "x", seed=0)
    assert [point.accuracy for point in points] == [point.share_forced for point in points]
    assert points[0].share_forced == 1
    used = [point.mean_thinking_tokens for point in points]
    assert used[0] == 4
    assert used == sorted(used)
    assert used[-1] <= 16
    stored = json.loads((tmp_path / "x/points.json").read_text())
    assert [point["budget"] for point in stored] == [4, 8, 16, 32]


def test_forced_answers_continue_the_very_tokens_of_the_cut(
    real: Actors, template: Template, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    complete = real.client.complete_tokens
    monkeypatch.setattr(
        real.client, "complete_tokens", lambda ids, *a, **k: (seen.extend(ids), complete(ids, *a, **k))[1]
    )
    cfg = ScalingConfig(budgets=(6,), sampling=replace(SAMPLING, num_samples=1), max_answer_tokens=2)
    measure(cfg, real, template, prompts[:1], tmp_path, "x", seed=5)
    thinking = real.generate(prompts[:1], cfg.sampling, seed=5)[0].samples[0].token_ids
    opening = template.ids("</think>\\boxed{")
    assert seen == [[*prompts[0].token_ids, *thinking[:6], *opening]]


def test_thinking_tokens_are_counted_to_the_end_mark(template: Template) -> None:
    def counted(text: str, finish: str = "stop") -> tuple[int, bool]:
        ids = template.ids(text)  # one token a byte
        sample = Sample(
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            text=template.tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=finish,
            weight_versions=(),
            server="",
        )
        return _thinking(sample, template, "</think>")

    assert counted("abc</think>\\boxed{7}") == (len("abc</think>"), True)
    assert counted("abcdef") == (6, True)
    assert counted("abcdef", "length") == (6, False)
    assert counted("a</think>b", "length") == (len("a</think>"), True)
