"""The batches of RL: which prompts, with which seeds, and the queue in which they are made ahead of their training.

Everything is a function of (seed, step): the prompts, the seeds of their samples, and, when groups are asked again, by
what they are replaced. So a batch can be made by a later process, or read again from the bank, and is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from megatron_t1.reward.config import RewardConfig
from megatron_t1.rollout.client import NoServerLeftError, RolloutClient, Score, counts_and_seeds, parts_of
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import Bank, StepBank
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.types import Group, Prompt, Sample

Generate = Callable[[list[Prompt], int, StepBank], list[Group]]
"""(prompts, seed, bank of the step) -> their graded groups."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on."""

    groups: list[Group]
    seconds: float
    """From its asking to its last grade."""
    tokens_per_s: float
    """Of what was generated for it in that time; what came from the bank is not."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What its refilling cost; empty when nothing is refilled."""


class Batches:
    """The batches of one run, in the order of its steps (counted from 0). Nothing is asked here."""

    def __init__(
        self,
        prompts: list[Prompt],
        *,
        prompts_per_step: int,
        refill: float,
        seed: int,
        sampling: SamplingConfig,
        reward: RewardConfig,
        bank: Bank,
    ) -> None:
        """`refill`: see `RLConfig`. `bank` keeps the samples of every step."""
        self.prompts, self.bank = prompts, bank
        self.sampling = sampling
        self._size, self._refill, self._seed = prompts_per_step, refill, seed
        self._reward = reward

    def prompts_of(self, step: int) -> list[Prompt]:
        """Each epoch is a permutation of its own, its incomplete last batch left out."""
        epoch, position = divmod(step, len(self.prompts) // self._size)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self.prompts))
        return [self.prompts[i] for i in order[position * self._size : (position + 1) * self._size]]

    def spare_prompts_of(self, step: int) -> list[Prompt]:
        """The prompts that may replace some of `prompts_of`, in the order in which they are asked."""
        taken = {prompt.id for prompt in self.prompts_of(step)}
        order = np.random.default_rng((self._seed, step, 1)).permutation(len(self.prompts))
        spare = (self.prompts[i] for i in order if self.prompts[i].id not in taken)
        return [prompt for prompt, _ in zip(spare, range(round(self._refill * self._size)), strict=False)]

    def make(self, step: int, weights: str, generate: Generate) -> Batch:
        """The batch of a step, asked by `generate` of the weights with this digest.

        With `refill`, groups whose samples are all right or all wrong are replaced by groups of other prompts, as many
        as are missing at a time, until none is missing or no prompt may be asked any more; then they fill the batch.
        """
        began = time.monotonic()
        bank = self.bank.step(step, weights, self.sampling.identity(), self._reward.deciding())
        seed = self._seed * 1_000_003 + step
        groups = generate(self.prompts_of(step), seed, bank)
        if not self._refill:
            return _made(groups, began, bank)
        spare, rounds = self.spare_prompts_of(step), 0
        while spare and (missing := self._size - sum(map(teaches, groups))) > 0:
            rounds += 1
            groups += generate(spare[:missing], seed + (rounds << 64), bank)
            spare = spare[missing:]
        kept = sorted(groups, key=lambda group: not teaches(group))[: self._size]  # stable: in the order of asking
        of_kept = {group.prompt.id for group in kept}
        left_out = [group for group in groups if group.prompt.id not in of_kept]
        metrics = {
            "refill/groups": float(len(left_out)),
            "refill/rounds": float(rounds),
            "refill/tokens": float(sum(len(sample.token_ids) for group in left_out for sample in group.samples)),
            "refill/pass_rate_asked": float(np.mean([correct for group in groups for correct in _correct(group)])),
        }
        return _made(kept, began, bank, metrics)


def _made(groups: list[Group], began: float, bank: StepBank, metrics: dict[str, float] | None = None) -> Batch:
    seconds = time.monotonic() - began
    return Batch(groups=groups, seconds=seconds, tokens_per_s=bank.num_tokens_added / seconds, metrics=metrics or {})


class BatchQueue:
    """Makes batches ahead of their training, on rank 0. As a contract:

    ask     never blocks: a thread for each batch asks the servers, grades, and refills. Samples that an earlier process
            finished come from the bank.
    settle  waits until no request is under way, whatever came of it: a push after it changes the weights of no sample.
            Returns whether all batches are whole.
    take    consumes the batch of a step, in their order; waits for its last grade.
            A batch that lost all servers is not whole, and raises NoServerLeftError here; the next `ask` has the rest
            of it made.
    close   ends what is under way; finished samples stay in the bank.
    """

    def __init__(self, batches: Batches, client: RolloutClient, score: Score, *, lag: int, begun_at: int) -> None:
        """
        Args:
            lag: steps that a batch is asked ahead.
            begun_at: steps done when this process began; above 0 an earlier one asked the `lag` batches from there
                on, of weights that are no more.
        """
        self._batches, self._client, self._score = batches, client, score
        self._asked_before = range(begun_at, begun_at + lag if begun_at else 0)
        self._pool = ThreadPoolExecutor(lag + 1, "batch")
        self._under_way: dict[int, Future[Batch]] = {}
        self._weights: dict[int, str] = {}

    def ask(self, steps: Iterable[int], weights: str) -> None:
        """Have the batches of `steps` made that are not yet, by servers that hold the weights with this digest."""
        for step in steps:
            future = self._under_way.get(step)
            if future is not None and not _lost_all_servers(future):
                continue
            stored = self._batches.bank.weights_of(step) if step in self._asked_before else None
            self._weights.setdefault(step, stored or weights)
            self._under_way[step] = self._pool.submit(self._batches.make, step, self._weights[step], self._generate)

    def settle(self) -> bool:
        return not any(map(_lost_all_servers, wait(self._under_way.values()).done))

    def take(self, step: int) -> Batch:
        """Raises what `RolloutClient.generate` raises."""
        batch = self._under_way[step].result()
        del self._under_way[step], self._weights[step]
        return batch

    def close(self) -> None:
        self._client.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _generate(self, prompts: list[Prompt], seed: int, bank: StepBank) -> list[Group]:
        return self._client.generate(prompts, self._batches.sampling, self._score, seed=seed, bank=bank)


def _lost_all_servers(future: Future[Batch]) -> bool:
    return future.done() and not future.cancelled() and isinstance(future.exception(), NoServerLeftError)


def teaches(group: Group) -> bool:
    """Whether the verdicts on its samples differ, whatever the penalties made of their rewards."""
    rewards = [sample.reward for sample in group.samples if sample.reward]
    return len({float(reward.correct) if reward.penalties else reward.value for reward in rewards}) > 1


def stored(sampling: SamplingConfig, rollout: RolloutConfig) -> Generate:
    """The groups as an earlier process asked for them with these settings, from the bank alone.

    The returned function raises ValueError for one that is not there.
    """

    def generate(prompts: list[Prompt], seed: int, bank: StepBank) -> list[Group]:
        groups = []
        for prompt, count, first in zip(prompts, *counts_and_seeds(len(prompts), sampling, seed), strict=True):
            samples: list[Sample] = []
            for j, part in parts_of(count, rollout, sampling):
                found = bank.find(prompt.token_ids.tolist(), first + j, part)
                if found is None:
                    raise ValueError(f"prompt {prompt.id}: its samples from number {j} on are not there")
                samples += found
            groups.append(Group(prompt=prompt, samples=samples))
        return groups

    return generate


def _correct(group: Group) -> list[bool]:
    return [bool(sample.reward and sample.reward.correct) for sample in group.samples]
