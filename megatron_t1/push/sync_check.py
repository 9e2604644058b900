"""`t1 sync-check`: pushes the trainer's weights unchanged (learning rate 0) and holds every server to the trainer.

Each server samples before and after the push, with the same seeds; the trainer computes the logprobs of the same
tokens. A server that held other weights before, one that holds wrong ones after (a dropped tensor, a wrong cut, a
stale cache, a packed copy that was not renewed, another config.json), and one whose answers move although nothing
changed all show as numbers. Whatever is found, the servers are on a known version afterwards, or named.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_t1.push.sync import PushReport, WeightSync
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.types import Sample

# The last two fill blocks of the prefix cache (16 tokens on a GPU, 128 on the CPU), so that a stale one would show.
PROMPT_LENGTHS = (8, 40, 160, 300)
NUM_NEW_TOKENS = 32
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean absolute difference of logprobs by the trainer's precision. bfloat16 rounds differently in two programs."""

TrainerLogprobs = Callable[[list[tuple[list[int], list[int]]]], list[np.ndarray]]
"""Collective: (prompt, response) pairs -> the trainer's logprobs of each response at temperature 1, on every rank."""


@dataclass(frozen=True)
class Row:
    """One prompt at one server: mean absolute differences of logprobs, in nats."""

    server: str
    prompt_tokens: int
    before: float
    """Server and trainer, before the push."""
    after: float
    """Server and trainer, after it."""
    moved: float
    """The server before and after, over the tokens up to the first that differs."""


@dataclass(frozen=True)
class SyncCheck:
    rows: list[Row]
    failed: dict[str, str]
    """Server -> why it took no part, or was left out of the push."""
    report: PushReport
    num_tensors: int
    tolerance: float

    def verdict(self, row: Row) -> str:
        if not row.after <= self.tolerance:
            return "WRONG after the push"
        if not row.before <= self.tolerance:
            return "held OTHER weights before"
        return "ok" if row.moved <= self.tolerance else "MOVED"

    @property
    def wrong(self) -> list[str]:
        """Servers with anything but `ok`."""
        return sorted(self.failed.keys() | {row.server for row in self.rows if self.verdict(row) != "ok"})

    def table(self) -> str:
        head = f"{'server':<24} {'prompt':>6} {'before':>9} {'after':>9} {'moved':>9}  verdict"
        lines = [head, *(self._line(row) for row in self.rows)]
        lines += [f"{name}: {why}" for name, why in self.failed.items()]
        lines.append(
            f"pushed {self.num_tensors} tensors, {self.report.num_bytes / 1e6:.1f} MB, as version "
            f"{self.report.version} in {self.report.total_s:.2f} s; before, after: mean |server - trainer| of "
            f"logprobs, moved: |after - before|, tolerance {self.tolerance:g}"
        )
        return "\n".join(lines)

    def _line(self, row: Row) -> str:
        numbers = " ".join(f"{value:9.1e}" for value in (row.before, row.after, row.moved))
        return f"{row.server:<24} {row.prompt_tokens:>6} {numbers}  {self.verdict(row)}"


def sync_check(
    sync: WeightSync, trainer_logprobs: TrainerLogprobs, *, vocab_size: int, max_tokens: int, tolerance: float
) -> SyncCheck:
    """Collective over the trainer's ranks; the same result on all of them.

    Args:
        max_tokens: longest prompt + response that the trainer can take.

    Raises:
        SyncError: no server took the weights.
    """
    servers = sync.servers.alive() if sync.servers else []
    longest = min([max_tokens, *(server.max_model_len for server in servers)]) - NUM_NEW_TOKENS
    draw = np.random.default_rng(0)
    prompts = [draw.integers(vocab_size, size=min(n, longest)).tolist() for n in PROMPT_LENGTHS]
    failed: dict[str, str] = {}
    # Blocks that an earlier check left in a prefix cache were summed in another order than a prompt read at once: to
    # them `before` would be a difference of its own. `after` has the same salt: blocks of the old weights would show.
    salt = secrets.token_hex(16)

    def ask() -> dict[str, list[Sample]]:
        answers = {}
        for server in servers:
            try:
                answers[server.name] = _ask(sync, server, prompts, vocab_size, salt)
            except ServerError as error:
                failed[server.name] = str(error)
        return answers

    before = ask()
    report = sync.push(sync.next_version())
    failed |= report.failed
    after = ask()

    answers = [*before.values(), *after.values()]
    asked = [(prompt, sample) for samples in answers for prompt, sample in zip(prompts, samples, strict=True)]
    pairs = sync.ranks.from_0("answers", [(prompt, sample.token_ids.tolist()) for prompt, sample in asked])
    trainers = iter(trainer_logprobs([(prompt, response) for prompt, response in pairs]))
    off = {id(sample): float(np.abs(sample.logprobs - next(trainers)).mean()) for _, sample in asked}
    rows = [
        [name, len(prompt), off[id(old)], off[id(new)], _moved(old, new)]
        for name in before
        if name in after
        for prompt, old, new in zip(prompts, before[name], after[name], strict=True)
    ]
    rows, failed = sync.ranks.from_0("rows", [rows, failed])
    return SyncCheck([Row(*row) for row in rows], failed, report, len(sync.plan.tensors), tolerance)


class _NoText:
    """Tokens are compared, nobody reads them."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return ""


def _ask(sync: WeightSync, server: Server, prompts: Sequence[list[int]], vocab_size: int, salt: str) -> list[Sample]:
    """One sample a prompt from this server, whatever version it holds."""
    assert sync.servers is not None
    sampling = SamplingConfig(temperature=1.0, num_samples=1, max_new_tokens=NUM_NEW_TOKENS)
    with RolloutClient(sync.servers.only(server), _NoText(), vocab_size=vocab_size) as client:
        return [samples[0] for samples in client.complete_tokens(prompts, sampling, seed=0, cache_salt=salt)]


def _moved(old: Sample, new: Sample) -> float:
    length = min(len(old.token_ids), len(new.token_ids))
    differs = np.flatnonzero(old.token_ids[:length] != new.token_ids[:length])
    # The first token that differs was drawn from logprobs that are compared through the tokens before it.
    same = int(differs[0]) if len(differs) else length
    if same == 0:
        return np.inf
    return float(np.abs(old.logprobs[:same] - new.logprobs[:same]).mean())
