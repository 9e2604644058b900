"""T1's reinforcement learning, the loop on one screen: read `Trainer.step` first.

One optimizer step a batch: sample K responses a prompt, grade them, leave-one-out advantages, the fused loss with
entropy bonus and KL to the EMA anchor, push the new weights with their version. With `rl.lag` 0, as T1 has it, a batch
is asked of the weights that it trains; else of those `lag` steps before, while others train. Everything random is a
function of (seed, step), so a resumed run asks the same prompts with the same seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_t1.config import UNCORRECTED, Config
from megatron_t1.engine import checkpoint
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.evaluation.questions import unanswerable
from megatron_t1.learner import Learner
from megatron_t1.metrics import Stopwatch
from megatron_t1.milestones import Milestones
from megatron_t1.platform.detect import Platform
from megatron_t1.push.ranks import NoServerError
from megatron_t1.push.sync import WeightSync
from megatron_t1.push.sync_check import mismatch
from megatron_t1.rank0 import Rank0
from megatron_t1.rollout.batches import Batch, Batches, BatchQueue
from megatron_t1.rollout.client import NoServerLeftError
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.servers.server import ServerError
from megatron_t1.stop import STOP, Stopped
from megatron_t1.trace import Trace
from megatron_t1.trackers import open_log
from megatron_t1.turns import Turns
from megatron_t1.types import Prompt, TrainSequence
from megatron_t1.warn import warn

T = TypeVar("T")

_MAX_OUTAGES = 5
"""Times that all servers may be lost in one step before the run ends."""
_NUM_FIRST_PROMPTS = 4
"""With which each server is held to the trainer before the first step."""


def on_main(job: Callable[[], T]) -> T:
    """What `job` returns on rank 0, on every rank; Stopped on all of them when rank 0 was asked to stop in it."""
    outcome: tuple[str, Any] | None = None
    if is_main():
        try:
            with STOP.interruptible():
                outcome = ("done", job())
        except Stopped:
            outcome = ("stopped", None)
    what, result = from_main(outcome)
    if what == "stopped":
        raise Stopped
    return result


class MismatchError(RuntimeError):
    """What the servers sample is not the policy that the trainer computes."""


def max_logprob_diff(cfg: Config, *, of_step: bool = False) -> float:
    """Bound of the mean |trainer - servers| of logprobs, when a server is asked for the check, or in the samples of a
    step; inf: none. `RLConfig` has the figures behind it."""
    if cfg.rl.max_logprob_diff is not None:
        return cfg.rl.max_logprob_diff or math.inf
    if of_step and cfg.sampling.cuts():
        return math.inf  # the servers' logprobs are of what is left, and more by -log of its mass
    if of_step and cfg.rl.lag:
        return 1.0
    return 0.01 if cfg.model.dtype == cfg.rollout.dtype == "float32" else 0.2


def _hold(logprob_diff: float, bound: float, where: str) -> None:
    if logprob_diff <= bound:
        return
    raise MismatchError(
        f"{where}: the mean |trainer - servers| of logprobs is {logprob_diff:.3g}, above rl.max_logprob_diff = "
        f"{bound:g}: the servers compute another function (weights that were not renewed, another config.json or "
        "dtype), and would teach a wrong one. `t1 sync-check --perturb` tells which server does; a higher bound, or 0, "
        "goes on all the same"
    )


def batches_of(cfg: Config, prompts: list[Prompt], folder: Path) -> Batches:
    """The batches of a run whose finished samples are kept in `folder`."""
    return Batches(
        prompts,
        prompts_per_step=cfg.rl.prompts_per_step,
        refill=cfg.rl.refill,
        seed=cfg.seed,
        sampling=cfg.sampling,
        reward=cfg.reward,
        bank=Bank(folder / "bank"),
    )


def check(cfg: Config, prompts: list[Prompt]) -> None:
    """Refuse, before anything is started, what would end the run after hours.

    Raises:
        ValueError: a batch larger than the data, a sample that may not fit into a microbatch.
    """
    cfg.rl.check_draws_from(len(prompts))
    cfg.parallel.check_fits(max(len(prompt.token_ids) for prompt in prompts) + cfg.sampling.max_new_tokens, cfg.model)


class Trainer:
    """Learner, servers and weight sync. Collective over the trainer's ranks; `rank0` are rank 0's alone."""

    def __init__(self, cfg: Config, platform: Platform, prompts: list[Prompt], rank0: Rank0 | None) -> None:
        """
        Raises:
            ValueError: what `check` refuses; a begun run in run_dir without `resume`, or of other settings.
        """
        check(cfg, prompts)
        if rank0 and cfg.trains_uncorrected:
            warn(UNCORRECTED)
        if rank0 and (told := unanswerable("data.train", prompts)):
            warn(told)
        self.cfg, self.prompts, self.rank0 = cfg, prompts, rank0
        self.folder = Path(cfg.run_dir) / "rl"
        self.trace = rank0.trace if rank0 else Trace()
        self.watch = Stopwatch(self.trace)
        self.learner = Learner(cfg, platform, self.watch)
        self.learner.resume(prompts)
        servers = rank0.servers if rank0 else None
        self.sync = WeightSync(self.learner.engine.pieces(), cfg.rollout, servers)
        self.turns = Turns(cfg, self.learner.offload, self.sync.ranks, servers, self.watch)
        self.bank = Bank(self.folder / "bank")
        self.queue = self._open_queue(rank0) if rank0 else None
        self.milestones = Milestones(cfg, self.learner.engine, rank0)
        self.log = open_log(cfg, "rl", self.steps_done) if is_main() else None
        self._rewards: list[float] = []  # of the steps since the last checkpoint

    @property
    def steps_done(self) -> int:
        return self.learner.steps_done

    def _open_queue(self, rank0: Rank0) -> BatchQueue:
        batches = batches_of(self.cfg, self.prompts, self.folder)
        return BatchQueue(batches, rank0.client, rank0.scorer.score, lag=self.cfg.rl.lag, begun_at=self.steps_done)

    def push(self) -> None:
        """Bring the servers to the policy as it is; its version is the number of steps that made it.

        Raises:
            MismatchError: a server answers with other logprobs than the trainer's.
            ValueError: a server takes fewer tokens than the run may ask of it.
        """
        if self.rank0:  # those that sleep were awaited before any rank took memory; who is missing is let in later
            self.rank0.servers.wait_ready(minimum=1 if self.cfg.rollout.sleep else None)
        from_main(None)  # this wait has its own deadline, that of a push is another
        self.turns.wake_for_push()
        self.sync.push(version=self.steps_done)
        self.turns.to_servers()
        if self.rank0:
            self.rank0.client.check_room(self.prompts, self.cfg.sampling)
            self.rank0.client.check_logprob_contract(self.prompts[0].token_ids.tolist())
        bound = max_logprob_diff(self.cfg)
        if math.isinf(bound):
            return
        engine = self.learner.engine

        def logprobs(sequences: list[TrainSequence]) -> list[np.ndarray]:
            self.turns.to_trainer()
            return engine.logprobs(sequences)

        found = mismatch(
            self.sync,
            logprobs,
            [prompt.token_ids.tolist() for prompt in self.prompts[:_NUM_FIRST_PROMPTS]],
            temperature=self.cfg.sampling.temperature,
            vocab_size=engine.spec.vocab_size,
            max_tokens=self.cfg.parallel.max_tokens_per_microbatch,
        )
        for server, value in found.items():
            _hold(value, bound, f"server {server} on weights {self.steps_done}, before the first step")
        if self.cfg.takes_turns:  # the trainer's answer has cost the servers their weights
            self._bring_up()

    def step(self) -> dict[str, float]:
        """One step of T1. Returns its metrics, the same on every rank.

        Raises:
            Stopped: the run was asked to stop; no step was taken, and the samples wait in the bank.
            MismatchError: the samples are not from the policy that was trained; the run must end here.
            FloatingPointError: as `Engine.step`.
        """
        watch = self.watch
        with watch("push"):
            pushed = self._finish_push()
        self.turns.to_servers()
        with watch("generate"):  # at a lag, what is left of it
            batch = self._collect()
        with watch("checkpoint"):  # of the step before: written long since, and it would be lost with this step
            self._finish_save(wait=False)
        with watch("measure"):
            measured = self._measure()
        self.turns.to_trainer()
        with watch("measure"):
            measured |= self.milestones.kl_to_start(self.steps_done, batch.groups)
        metrics = self.learner.learn(batch.groups)
        # Neither pushed nor saved yet: where this ends the run, the step was not taken, and its samples are of no use.
        try:
            if not metrics["skipped"]:
                bound = max_logprob_diff(self.cfg, of_step=True)
                _hold(metrics["logprob_diff"], bound, f"step {self.steps_done}, which is dropped")
        except MismatchError:
            if self.queue:
                self.queue.close()
                self.bank.drop_from(self.steps_done - 1)
            raise
        if self.cfg.awaits_batches:
            with watch("generate"):  # no sample of two weights; and what a checkpoint needs of the past is in the bank
                self._settle()
        with watch("push"):  # the servers load while the anchor, the log and the checkpoint are brought up to date
            self.turns.wake_for_push()
            self.sync.begin_push(version=self.steps_done)
            if not self.cfg.takes_turns:
                self._ask(self.cfg.rl.lag)
        self.learner.follow()
        if self.log:
            self.log.samples(self.steps_done, batch.groups)
        return metrics | batch.metrics | {"generate_tokens_per_s": batch.tokens_per_s} | measured | pushed

    def train(self) -> Path:
        """All steps that are left; returns the exported Hugging Face folder."""
        cfg = self.cfg
        self.trace.take_busy_s()  # an evaluation before the first step is not part of it
        self.watch.lap()
        bar = tqdm(total=cfg.rl.steps, initial=self.steps_done, desc="rl", unit="step", disable=not is_main())
        while self.steps_done < cfg.rl.steps:
            began = time.monotonic()
            try:
                metrics = self.step()
            except (Stopped, MismatchError, FloatingPointError) as error:
                if isinstance(error, Stopped):
                    self._save()
                self._finish_save()
                raise
            self._rewards.append(metrics["reward"])
            seconds = self.watch.lap()
            ended = time.monotonic()
            self.trace.span("steps", f"step {self.steps_done}", began, ended)
            metrics |= self._idle_shares(seconds, ended - began)
            if self.rank0:
                scorer = self.rank0.scorer
                metrics |= {"graders/killed": scorer.num_kills, "graders/lost": scorer.num_lost}
            metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
            metrics["weight_version"] = self.steps_done
            metrics["train_tokens_per_s"] = metrics["num_response_tokens"] / (seconds["anchor"] + seconds["train"])
            if self.log:
                self.log.log(self.steps_done, metrics)
                bar.set_postfix_str(
                    f"reward {metrics['reward']:.3f}, entropy {metrics['entropy']:.3f}, "
                    f"mismatch {metrics['logprob_diff']:.1e}",
                    refresh=False,
                )
                bar.update()
            # The checkpoint last: a run that was killed and resumes from there would lack the step's line or snapshot.
            with self.watch("checkpoint"):
                self._finish_save(wait=False)
                self.milestones.snapshot(self.steps_done)
                if cfg.rl.checkpoint.due(self.steps_done, cfg.rl.steps):
                    self._save()
        bar.close()
        self._finish_save()
        self._finish_push()
        self.turns.to_trainer()  # a run that is resumed at its end has only pushed
        self.learner.engine.save_hf(self.folder / "hf")
        if self.cfg.takes_turns:
            self._bring_up()
        self._measure()
        return self.folder / "hf"

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.queue:
            self.queue.close()
        self.sync.close()
        if self.log:
            self.log.__exit__(kind, error, trace)

    def _save(self) -> None:
        """Begin a checkpoint of the steps done, unless it is there already."""
        if not self._rewards:
            return
        self._finish_save()
        self.turns.to_trainer()
        self.learner.begin_save(float(np.mean(self._rewards)))
        self._rewards.clear()

    def _finish_save(self, *, wait: bool = True) -> None:
        if self.learner.saver.finish(wait=wait) and is_main():  # what is needed to replay a step stays
            kept = checkpoint.finished(self.learner.checkpoints, until=self.steps_done)[-self.cfg.rl.checkpoint.keep :]
            self.bank.drop_before(checkpoint.step_of(kept[0]))

    def _finish_push(self) -> dict[str, float]:
        """Wait until the servers hold the weights of the last push; returns what it cost. If all are lost, `_collect`
        brings them back before it asks for samples."""
        try:
            report = self.sync.finish_push()
        except NoServerError as error:
            if is_main():
                warn(str(error))
            return {}
        began = report.began
        for phase, seconds in report.seconds.items():
            self.trace.span("push", phase, began, began + seconds)
            began += seconds
        return {"push_seconds": report.total_s, "push_stall_seconds": report.stall_s}

    def _measure(self) -> dict[str, float]:
        """Held-out accuracy of the weights that the servers hold, every `rl.measure_every` steps."""
        if not self.milestones.due(self.steps_done):
            return {}
        return on_main(partial(self.milestones.evaluate, self.steps_done, self.sync.fingerprint))

    def _idle_shares(self, seconds: dict[str, float], step_s: float) -> dict[str, float]:
        """Shares of a step in which trainer and servers compute nothing; {} on ranks that ask no servers."""
        if self.rank0 is None:
            return {}
        busy = [busy_s for track, busy_s in self.trace.take_busy_s().items() if track.startswith("server ")]
        servers = len(self.rank0.servers.alive()) or 1
        return {
            "idle/trainer": max(0.0, 1 - (seconds["anchor"] + seconds["train"]) / step_s),
            "idle/servers": max(0.0, 1 - sum(busy) / servers / step_s),
        }

    def _ask(self, lag: int) -> None:
        """Have the batches made that may be by now: up to `lag` steps ahead."""
        if self.queue:
            last = min(self.steps_done + lag, self.cfg.rl.steps - 1)
            self.queue.ask(range(self.steps_done, last + 1), self.sync.fingerprint)

    def _settle(self) -> None:
        """Wait until the batches are whole that were asked. Not cut short by a stop: their weights are gone with this
        process, and a later one could not go on with them.

        Raises:
            ServerError: the servers were lost `_MAX_OUTAGES` times.
        """
        for _ in range(_MAX_OUTAGES):
            if from_main(self.queue.settle() if self.queue else None):
                return
            if self.rank0:
                warn("all servers were lost in a batch; it is made whole with the weights that it began with")
                self._await_servers()
            from_main(None)  # as in `push`
            with self.learner.before_last_step():
                self.sync.bring_up()
            self._ask(self.cfg.rl.lag - 1)
        raise ServerError(f"all servers were lost {_MAX_OUTAGES} times after step {self.steps_done}; see their logs")

    def _collect(self) -> Batch:
        """The step's batch, on every rank. Servers that are all lost are brought back and asked for the rest.

        Raises:
            Stopped: rank 0 was asked to stop.
            ServerError: the servers were lost `_MAX_OUTAGES` times.
        """
        for _ in range(_MAX_OUTAGES):
            self._finish_save(wait=False)  # if no server comes back, only what is finished is left of it
            on_main(self._await_servers)
            for name in self._bring_up():
                print(f"server {name} holds weights {self.steps_done} and is asked from now on", flush=True)
            self._ask(self.cfg.rl.lag)
            batch = on_main(self._take)
            if batch is not None:
                return batch
        raise ServerError(f"all servers were lost {_MAX_OUTAGES} times in step {self.steps_done + 1}; see their logs")

    def _bring_up(self) -> list[str]:
        """As `WeightSync.bring_up`; the weights may be away, and who came is awake: it is the trainer's turn then."""

        def before() -> None:
            self.turns.to_trainer()
            self.turns.wake_for_push()

        names = self.sync.bring_up(before if self.cfg.takes_turns else lambda: None)
        self.turns.to_servers()
        return names

    def _take(self) -> Batch | None:
        """Rank 0: the step's batch; None when all servers were lost."""
        assert self.queue is not None
        try:
            return self.queue.take(self.steps_done)
        except NoServerLeftError as error:
            warn(f"{error}\nThey are started again; the samples that were finished are kept.")
            return None

    def _await_servers(self) -> None:
        """Rank 0: starts lost servers anew, and waits when none is left. They have no weights yet: `bring_up` does."""
        assert self.rank0 is not None
        servers = self.rank0.servers
        revived = servers.revive()
        for server in revived:
            warn(f"server {server.name} is new, or was lost and is started again: it gets the current weights first")
        if self.cfg.rollout.sleep and any(server.process for server in revived):
            servers.wait_ready()  # a start takes memory, which is the trainer's later on
        elif not servers.usable():
            servers.wait_ready(minimum=1)
