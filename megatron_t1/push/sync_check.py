"""`t1 sync-check`: pushes the trainer's weights into every server and holds each to the trainer.

Each server samples before and after the push, with the same seeds; the trainer computes the logprobs of the same
tokens. A server that held other weights before, one that holds wrong ones after (a dropped tensor, a wrong cut, a
stale cache, another config.json), and one whose answers move although nothing changed all show as numbers.

That push changes nothing, so a server that keeps something of its old weights passes it. With `perturb` the trainer
first pushes weights with a known change in every tensor (`perturb.py`), and expects its own new logprobs:

    ask | change, push, ask | change back, push, ask | the trainer computes all logprobs

From the first push to the last only that stands which the servers must be asked for: what else may fail comes
afterwards, and a signal waits. Whatever is found, the servers are on a known version afterwards, or named.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_t1.models.weight_map import Piece
from megatron_t1.push.perturb import held_back_signals, perturbed
from megatron_t1.push.ranks import SyncError
from megatron_t1.push.sync import PushReport, WeightSync
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.types import Sample, TrainSequence
from megatron_t1.warn import warn

# The last two fill blocks of the prefix cache (16 tokens on a GPU, 128 on the CPU), so that a stale one would show.
PROMPT_LENGTHS = (8, 40, 160, 300)
NUM_NEW_TOKENS = 32
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean absolute difference of logprobs by the trainer's precision. bfloat16 rounds differently in two programs."""
_ROUNDING_FACTOR = 4.0
"""How much further than on its own weights a server may be from the trainer on changed ones: more than rounding makes,
less than most tensors that were not renewed."""
_LEAST_ROUNDING = 1e-5
"""Taken for a server that agrees with the trainer better than this, nats."""

TrainerLogprobs = Callable[[list[TrainSequence]], list[np.ndarray]]
"""Collective, the same sequences on every rank: the trainer's logprobs of each response, on every rank."""
Answers = dict[str, list[Sample]]
"""Server -> its answer to each prompt."""


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
    changed: float | None = None
    """Server and trainer, both on the changed weights; None: no change was pushed."""
    effect: float | None = None
    """The trainer on the changed weights and on its own, on what the server said on the changed ones."""


@dataclass(frozen=True)
class SyncCheck:
    rows: list[Row]
    failed: dict[str, str]
    """Server -> why it took no part, or was left out of the push."""
    report: PushReport
    """Of the last push, which left the trainer's own weights."""
    num_tensors: int
    tolerance: float

    def verdict(self, row: Row) -> str:
        if not row.after <= self.tolerance:
            return "WRONG after the push"
        if row.changed is not None and row.effect is not None:
            bound = self.changed_tolerance(row.server)
            if not row.effect > bound:
                return "the change shows NOTHING"
            if not row.changed <= bound:
                return "KEPT old weights"
        if not row.before <= self.tolerance:
            return "held OTHER weights before"
        return "ok" if row.moved <= self.tolerance else "MOVED"

    def changed_tolerance(self, server: str) -> float:
        """For `changed`: what rounding makes at this server, with a margin."""
        rounding = max(row.after for row in self.rows if row.server == server)
        return min(self.tolerance, _ROUNDING_FACTOR * max(rounding, _LEAST_ROUNDING))

    @property
    def wrong(self) -> list[str]:
        """Servers with anything but `ok`."""
        return sorted(self.failed.keys() | {row.server for row in self.rows if self.verdict(row) != "ok"})

    def table(self) -> str:
        perturbed = any(row.changed is not None for row in self.rows)
        columns = ["before", *["changed", "effect"] * perturbed, "after", "moved"]
        titles = " ".join(f"{column:>9}" for column in columns)
        lines = [f"{'server':<24} {'prompt':>6} {titles}  verdict"]
        lines += [self._line(row, columns) for row in self.rows]
        lines += [f"{name}: {why}" for name, why in self.failed.items()]
        lines.append(
            f"pushed {self.num_tensors} tensors, {self.report.num_bytes / 1e6:.1f} MB, as version "
            f"{self.report.version} in {self.report.total_s:.2f} s; before, after: mean |server - trainer| of "
            f"logprobs, moved: |after - before|, tolerance {self.tolerance:g}"
        )
        if perturbed:
            largest = {row.server: self.changed_tolerance(row.server) for row in self.rows}
            lines.append(
                "changed: the same on weights that were changed, pushed and put back; effect: what the change does to "
                "the trainer's own; tolerance " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
            )
        return "\n".join(lines)

    def _line(self, row: Row, columns: list[str]) -> str:
        numbers = " ".join(f"{getattr(row, column):9.1e}" for column in columns)
        return f"{row.server:<24} {row.prompt_tokens:>6} {numbers}  {self.verdict(row)}"


def sync_check(
    sync: WeightSync,
    trainer_logprobs: TrainerLogprobs,
    *,
    vocab_size: int,
    max_tokens: int,
    tolerance: float,
    perturb: Sequence[Piece] | None = None,
) -> SyncCheck:
    """Collective over the trainer's ranks; the same result on all of them.

    Args:
        trainer_logprobs: at temperature 1.
        max_tokens: longest prompt + response that the trainer can take.
        perturb: all pieces of this rank, aliasing the weights that are pushed and that `trainer_logprobs` computes
            with: push them changed, too.

    Raises:
        SyncError: no server took the weights; or, with `perturb`, none got the unchanged ones back.
    """
    servers = sync.servers.alive() if sync.servers else []
    draw = np.random.default_rng(0)
    drawn = [draw.integers(vocab_size, size=n).tolist() for n in PROMPT_LENGTHS]
    prompts, sampling = _fitting(drawn, servers, max_tokens)
    failed: dict[str, str] = {}
    # Blocks that an earlier check left in a prefix cache were summed in another order than a prompt read at once: to
    # them `before` would be a difference of its own. `after` has the same salt: blocks of the old weights would show.
    salt = secrets.token_hex(16)

    def ask() -> Answers:
        return _ask(sync, servers, prompts, sampling, vocab_size, salt, failed)

    before = ask()
    changed: Answers = {}
    if perturb is None:
        report = sync.push(sync.next_version())
    else:
        changed, report = _push_changed(sync, perturb, ask, failed)
    failed |= report.failed
    after = ask()

    of_trainer = _trainers(sync, trainer_logprobs, prompts, [before, changed, after])
    changed_of_trainer: dict[int, np.ndarray] = {}
    if perturb is not None:
        with perturbed(perturb):
            changed_of_trainer = _trainers(sync, trainer_logprobs, prompts, [changed])

    rows: list[list[Any]] = []
    for name in before:
        if name not in after or (perturb is not None and name not in changed):
            continue
        for i, prompt in enumerate(prompts):
            old, new = before[name][i], after[name][i]
            numbers = [_off(old.logprobs, of_trainer[id(old)]), _off(new.logprobs, of_trainer[id(new)])]
            numbers.append(_moved(old, new))
            if perturb is not None:
                answer = changed[name][i]
                expected = changed_of_trainer[id(answer)]
                numbers += [_off(answer.logprobs, expected), _off(expected, of_trainer[id(answer)])]
            rows.append([name, len(prompt), *numbers])
    rows, failed = sync.ranks.from_0("rows", [rows, failed])
    return SyncCheck([Row(*row) for row in rows], failed, report, len(sync.plan.tensors), tolerance)


def mismatch(
    sync: WeightSync,
    trainer_logprobs: TrainerLogprobs,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    vocab_size: int,
    max_tokens: int,
) -> dict[str, float]:
    """Collective: each server's mean |server - trainer| of logprobs over its answers to `prompts`, at the version that
    it should hold. A server that does not answer is left out, and said."""
    servers = sync.servers.usable() if sync.servers else []
    prompts, sampling = _fitting(prompts, servers, max_tokens)
    sampling, salt = replace(sampling, temperature=temperature), secrets.token_hex(16)
    failed: dict[str, str] = {}
    answers = _ask(sync, servers, prompts, sampling, vocab_size, salt, failed)
    for why in failed.values():
        warn(f"not held to the trainer: {why}")
    of_trainer = _trainers(sync, trainer_logprobs, prompts, [answers])
    means = {
        name: _off(
            np.concatenate([sample.logprobs for sample in samples]),
            np.concatenate([of_trainer[id(sample)] for sample in samples]),
        )
        for name, samples in answers.items()
    }
    found: dict[str, float] = sync.ranks.from_0("mismatch", means)
    return found


def _push_changed(
    sync: WeightSync, pieces: Sequence[Piece], ask: Callable[[], Answers], failed: dict[str, str]
) -> tuple[Answers, PushReport]:
    """What the servers answer on changed weights, and the push that brought the unchanged ones back."""
    version = sync.next_version()
    changed: Answers = {}
    with held_back_signals("the servers get their weights back"):
        try:
            with perturbed(pieces):
                failed |= sync.push(version).failed
            changed = ask()
        finally:
            try:
                report = sync.push(version + 1)
            except SyncError as error:
                raise SyncError(
                    f"{error}\nServers of version {version} hold changed weights: `t1 sync-check` brings them back"
                ) from error
    return changed, report


def _fitting(
    prompts: Iterable[list[int]], servers: Sequence[Server], max_tokens: int
) -> tuple[list[list[int]], SamplingConfig]:
    """The prompts, cut so that the answers fit too, and how these are drawn at temperature 1."""
    room = min([max_tokens, *(server.max_model_len for server in servers)])
    answer = min(NUM_NEW_TOKENS, room // 2)
    sampling = SamplingConfig(temperature=1.0, num_samples=1, max_new_tokens=answer)
    return [prompt[: room - answer] for prompt in prompts], sampling


class _NoText:
    """Tokens are compared, nobody reads them."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return ""


def _ask(
    sync: WeightSync,
    servers: Sequence[Server],
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    vocab_size: int,
    salt: str,
    failed: dict[str, str],
) -> Answers:
    """Rank 0: one sample a prompt from each server, whatever version it holds; {} elsewhere. Adds to `failed`."""

    def ask(server: Server) -> list[Sample] | ServerError:
        assert sync.servers is not None
        try:
            with RolloutClient(sync.servers.only(server), _NoText(), vocab_size=vocab_size) as client:
                return [samples[0] for samples in client.complete_tokens(prompts, sampling, seed=0, cache_salt=salt)]
        except ServerError as error:
            return error

    answers: Answers = {}
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        for server, answer in zip(servers, pool.map(ask, servers), strict=True):
            if isinstance(answer, ServerError):
                failed[server.name] = str(answer)
            else:
                answers[server.name] = answer
    return answers


def _trainers(
    sync: WeightSync, trainer_logprobs: TrainerLogprobs, prompts: Sequence[list[int]], answers: Sequence[Answers]
) -> dict[int, np.ndarray]:
    """Collective: the trainer's logprobs of each answer, by the id of its Sample on rank 0; {} elsewhere."""
    samples = [sample for of_servers in answers for of_server in of_servers.values() for sample in of_server]
    asked = [prompt for of_servers in answers for _ in of_servers for prompt in prompts]
    pairs = [(prompt, sample.token_ids.tolist()) for prompt, sample in zip(asked, samples, strict=True)]
    pairs = sync.ranks.from_0("answers", pairs)
    sequences = [TrainSequence(prompt_ids=np.array(ids), response_ids=np.array(response)) for ids, response in pairs]
    computed = trainer_logprobs(sequences) if sequences else []
    return dict(zip(map(id, samples), computed, strict=False))


def _off(logprobs: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(logprobs - others).mean())


def _moved(old: Sample, new: Sample) -> float:
    length = min(len(old.token_ids), len(new.token_ids))
    differs = np.flatnonzero(old.token_ids[:length] != new.token_ids[:length])
    # The first token that differs was drawn from logprobs that are compared through the tokens before it.
    same = int(differs[0]) if len(differs) else length
    if same == 0:
        return np.inf
    return float(np.abs(old.logprobs[:same] - new.logprobs[:same]).mean())
