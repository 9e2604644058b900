"""Which prompts a batch asks, and by what its groups that teach nothing are replaced: functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from megatron_t1.reward.config import RewardConfig
from megatron_t1.rollout.batches import Batch, Batches, stored, teaches
from megatron_t1.rollout.client import counts_and_seeds, parts_of
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import Bank, StepBank
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.types import Group, Prompt, Reward, Sample

PROMPTS = [Prompt(id=f"p{i}", text="", token_ids=np.array([i]), gold="") for i in range(40)]
SAMPLING = SamplingConfig(num_samples=4)
ROLLOUT = RolloutConfig(samples_per_request=2)


def batches(folder, refill: float, seed: int = 3) -> Batches:
    fixed = {"prompts_per_step": 8, "sampling": SAMPLING, "reward": RewardConfig(), "bank": Bank(folder)}
    return Batches(PROMPTS, refill=refill, seed=seed, **fixed)


def sampled(is_right: Callable[[str, int], bool], asked: list[str]):
    """Answers each prompt: `is_right(id, j)` says if its sample j is. Every other wrong one has a penalty."""

    def generate(prompts: list[Prompt], seed: int, bank: StepBank) -> list[Group]:
        groups = []
        for prompt in prompts:
            asked.append(prompt.id)
            right = [is_right(prompt.id, j) for j in range(SAMPLING.num_samples)]
            samples = [
                Sample(
                    token_ids=np.array([7] * (j + 1)), logprobs=np.full(j + 1, -1, np.float32), text="",
                    finish_reason="stop", weight_versions=((0, 0, j + 1),), server="",
                    reward=Reward(value=1 if ok else -(j % 2), correct=ok, outcome="correct" if ok else "wrong",
                                  extracted=None, reason="", penalties={} if ok or j % 2 == 0 else {"overlong": ""}),
                )
                for j, ok in enumerate(right)
            ]  # fmt: skip
            groups.append(Group(prompt=prompt, samples=samples))
        return groups

    return generate


def ids(batch: Batch) -> list[str]:
    return [group.prompt.id for group in batch.groups]


def test_an_epoch_asks_every_prompt_once(tmp_path) -> None:
    of = batches(tmp_path, 0.0)
    first, second = ([p.id for step in steps for p in of.prompts_of(step)] for steps in (range(5), range(5, 10)))
    assert sorted(first) == sorted(second) == sorted(p.id for p in PROMPTS)
    assert first != second


def test_groups_that_are_all_right_or_all_wrong_are_replaced(tmp_path) -> None:
    """By correctness: the -1 of a penalty does not make an all-wrong group one that teaches."""
    asked: list[str] = []
    generate = sampled(lambda name, j: int(name[1:]) % 4 == 0 or (int(name[1:]) % 4 == 1 and j == 0), asked)
    of = batches(tmp_path, refill=3.0)
    batch = of.make(2, "weights", generate)
    assert len(asked) == len(set(asked)), "no prompt is asked twice"
    assert set(asked[:8]) == {p.id for p in of.prompts_of(2)}
    assert len(batch.groups) == 8
    assert all(teaches(group) for group in batch.groups)
    assert [int(name[1:]) % 4 for name in ids(batch)] == [1] * 8
    assert batch.metrics["refill/groups"] == len(asked) - 8
    assert batch.metrics["refill/tokens"] == (len(asked) - 8) * (1 + 2 + 3 + 4)
    right = [int(name[1:]) % 4 == 0 or (int(name[1:]) % 4 == 1 and j == 0) for name in asked for j in range(4)]
    assert batch.metrics["refill/pass_rate_asked"] == pytest.approx(np.mean(right))
    again: list[str] = []
    assert ids(of.make(2, "weights", sampled(lambda name, j: int(name[1:]) % 4 == 1 and j == 0, again))) == ids(batch)
    other: list[str] = []
    batches(tmp_path, refill=3.0, seed=4).make(2, "weights", sampled(lambda *_: False, other))
    assert other != asked[: len(other)]


def test_it_ends_when_no_more_may_be_asked(tmp_path) -> None:
    asked: list[str] = []
    of = batches(tmp_path, refill=0.5)
    batch = of.make(0, "weights", sampled(lambda name, j: name == of.spare_prompts_of(0)[1].id and j == 0, asked))
    assert len(asked) == 8 + 4
    assert ids(batch) == [asked[9], *asked[:7]], "the one that teaches, then those that were asked first"
    assert batch.metrics["refill/rounds"] == 1


def test_a_stored_batch_is_read_again(tmp_path) -> None:
    generate = sampled(lambda name, j: j == int(name[1:]) % 5, [])

    def ask_and_keep(prompts: list[Prompt], seed: int, bank: StepBank) -> list[Group]:
        read = stored(SAMPLING, ROLLOUT)
        with pytest.raises(ValueError, match="its samples from number 0 on are not there"):
            read(prompts, seed, bank)
        groups = generate(prompts, seed, bank)
        for group, count, first in zip(groups, *counts_and_seeds(len(prompts), SAMPLING, seed), strict=True):
            for j, part in parts_of(count, ROLLOUT, SAMPLING):
                ids = group.prompt.token_ids.tolist()
                bank.add(group.prompt.id, ids, first + j, group.samples[j : j + part])
        return groups

    of = batches(tmp_path, refill=2.0)
    made = of.make(1, "w", ask_and_keep)
    assert of.bank.weights_of(1) == "w"
    read = batches(tmp_path, refill=2.0).make(1, "w", stored(SAMPLING, ROLLOUT))
    assert ids(read) == ids(made)
    assert read.metrics == made.metrics
    assert made.tokens_per_s > 0
    assert read.tokens_per_s == 0, "nothing was generated for it"
    for one, other in zip(made.groups, read.groups, strict=True):
        assert [s.token_ids.tolist() for s in one.samples] == [s.token_ids.tolist() for s in other.samples]
        assert [s.reward for s in one.samples] == [s.reward for s in other.samples]


def test_what_a_release_without_top_k_sampled_is_found_again() -> None:
    assert SamplingConfig().identity().keys() == {field.name for field in fields(SamplingConfig)} - {"top_k"}
    assert SamplingConfig(top_k=5).identity()["top_k"] == 5


@pytest.mark.parametrize(
    ("rewards", "differ"),
    [
        ([(1.0, {}), (0.0, {})], True),
        ([(0.0, {}), (-1.0, {"overlong": ""})], False),
        ([(0.25, {}), (0.75, {})], True),
        ([(0.5, {}), (0.5, {})], False),
    ],
)
def test_a_group_teaches_where_its_verdicts_differ(rewards: list[tuple[float, dict[str, str]]], differ: bool) -> None:
    (group,) = sampled(lambda *_: False, [])(PROMPTS[:1], 0, None)
    for sample, (value, penalties) in zip(group.samples, rewards, strict=False):
        sample.reward = replace(sample.reward, value=value, correct=value == 1, penalties=penalties)
    group.samples = group.samples[: len(rewards)]
    assert teaches(group) == differ
