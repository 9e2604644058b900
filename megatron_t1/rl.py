"""T1's reinforcement learning, the loop on one screen: read `Trainer.step` first.

One optimizer step a batch, on policy: sample K responses a prompt, grade them, leave-one-out advantages, the fused loss
with entropy bonus and KL to the EMA anchor, push the new weights with their version. Everything random is a function of
(seed, step), so a resumed run asks the same prompts with the same seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_t1 import plugins
from megatron_t1.algo import advantage
from megatron_t1.algo.config import TOKEN_LOSSES
from megatron_t1.config import Config
from megatron_t1.data.packing import sequences_of
from megatron_t1.engine import checkpoint
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.engine.resume_check import data_identity, model_identity, named
from megatron_t1.engine.step import Engine
from megatron_t1.metrics import Stopwatch, rollout_metrics
from megatron_t1.platform.detect import Platform
from megatron_t1.push.ranks import NoServerError
from megatron_t1.push.sync import WeightSync
from megatron_t1.push.sync_check import mismatch
from megatron_t1.rank0 import Rank0
from megatron_t1.rollout.client import NoServerLeftError
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.servers.server import ServerError
from megatron_t1.stop import STOP, Stopped
from megatron_t1.trace import Trace
from megatron_t1.trackers import open_log
from megatron_t1.types import Group, Prompt
from megatron_t1.warn import warn

T = TypeVar("T")

_MAX_OUTAGES = 5
"""Times that all servers may be lost in one step before the run ends."""
_NUM_FIRST_PROMPTS = 4
"""With which each server is held to the trainer before the first step."""


class MismatchError(RuntimeError):
    """What the servers sample is not the policy that the trainer computes."""


def max_logprob_diff(cfg: Config) -> float:
    """Bound of the mean |trainer - servers| of logprobs; inf: none. `RLConfig` has the figures behind it."""
    if cfg.rl.max_logprob_diff is not None:
        return cfg.rl.max_logprob_diff or math.inf
    whole = cfg.sampling.top_p == 1 and cfg.sampling.min_p == 0  # else the servers' logprobs are of what is left
    return 0.01 if whole and cfg.model.dtype == cfg.rollout.dtype == "float32" else 0.2


def check(cfg: Config, prompts: list[Prompt]) -> None:
    """Refuse, before anything is started, what would end the run after hours.

    Raises:
        ValueError: a batch larger than the data, a sample that may not fit into a microbatch.
    """
    if len(prompts) < cfg.rl.prompts_per_step:
        raise ValueError(
            f"rl.prompts_per_step = {cfg.rl.prompts_per_step} is larger than the {len(prompts)} questions; lower it"
        )
    cfg.parallel.check_fits(max(len(prompt.token_ids) for prompt in prompts) + cfg.sampling.max_new_tokens)


class Trainer:
    """Policy, anchor and weight sync. Collective over the trainer's ranks; `rank0` are rank 0's alone."""

    def __init__(self, cfg: Config, platform: Platform, prompts: list[Prompt], rank0: Rank0 | None) -> None:
        """
        Raises:
            ValueError: what `check` refuses; a begun run in run_dir without `resume`, or of other settings.
        """
        check(cfg, prompts)
        self.cfg, self.prompts, self.rank0 = cfg, prompts, rank0
        self.folder = Path(cfg.run_dir) / "rl"
        self.engine = Engine(
            cfg.model,
            cfg.parallel,
            cfg.rl.optim,
            platform,
            total_steps=cfg.rl.steps,
            temperature=cfg.sampling.temperature,
        )
        self.engine.load_weights(Path(cfg.model.hf_path))
        self.anchor = Anchor(self.engine, cfg.anchor) if cfg.loss.kl_coef else None
        self.settings = self._settings() if is_main() else {}
        self.steps_done = checkpoint.resume(
            self.folder / "checkpoints",
            self.engine,
            self.anchor,
            allowed=cfg.resume,
            settings=self.settings,
            may_change=cfg.resume_with_changes,
        )
        self.sync = WeightSync(self.engine.pieces(), cfg.rollout, rank0.servers if rank0 else None)
        self.bank = Bank(self.folder / "bank")
        self.log = open_log(cfg, "rl", self.steps_done) if is_main() else None
        self.trace = rank0.trace if rank0 else Trace()
        self.watch = Stopwatch(self.trace)
        self.max_logprob_diff = max_logprob_diff(cfg)
        self._rewards: list[float] = []  # of the steps since the last checkpoint

    def _settings(self) -> dict[str, Any]:
        cfg = self.cfg
        rows = ((p.id, p.token_ids.tobytes(), p.gold, p.mode, *p.choices) for p in self.prompts)
        return named(
            **{"data.train": data_identity(rows), "seed": cfg.seed, "rl.prompts_per_step": cfg.rl.prompts_per_step},
            **{"model": model_identity(cfg.model), "model.dtype": cfg.model.dtype, "rl.optim": cfg.rl.optim},
            sampling=cfg.sampling,
            loss=cfg.loss,
            anchor=cfg.anchor,
            **{"reward.penalties": cfg.reward.penalties, "reward.refuse_copies": cfg.reward.refuse_copies},
            plugins=plugins.identity(),
        )

    def push(self) -> None:
        """Bring the servers to the policy as it is; its version is the number of steps that made it.

        Raises:
            MismatchError: a server answers with other logprobs than the trainer's.
        """
        self.sync.push(version=self.steps_done)
        if math.isinf(self.max_logprob_diff):
            return
        found = mismatch(
            self.sync,
            self.engine.logprobs,
            [prompt.token_ids.tolist() for prompt in self.prompts[:_NUM_FIRST_PROMPTS]],
            temperature=self.cfg.sampling.temperature,
            vocab_size=self.engine.spec.vocab_size,
            max_tokens=self.cfg.parallel.max_tokens_per_microbatch,
        )
        for server, value in found.items():
            self._hold(value, f"server {server} on weights {self.steps_done}, before the first step")

    def step(self) -> dict[str, float]:
        """One step of T1. Returns its metrics, the same on every rank.

        Raises:
            Stopped: the run was asked to stop before it trained; no step was taken.
            MismatchError: the samples are not from the policy that was trained; the run must end here.
        """
        cfg, watch = self.cfg, self.watch
        with watch("push"):
            pushed = self._finish_push()
        with watch("generate"):
            groups = self._collect()
        with watch("pack"):
            advantage.assign(groups, cfg.loss.advantage)
            sequences = sequences_of(groups)
            microbatches = self.engine.pack(sequences)
        with watch("anchor"):
            kl = self.anchor.fill(microbatches, sequences, cfg.loss) if self.anchor else {}
        # Asked to stop meanwhile: the samples wait in the bank, and training would take longest.
        self._on_main(lambda: None)
        with watch("train"):
            num_targets = sum(len(sequence.response_ids) for sequence in sequences)
            loss = partial(TOKEN_LOSSES[cfg.loss.token_loss], cfg=cfg.loss)
            metrics = self.engine.step(microbatches, num_targets, loss, self.anchor.chunks if self.anchor else None)
        # Neither pushed nor saved yet: where this ends the run, the step was not taken, and its samples are of no use.
        try:
            self._hold(metrics["logprob_diff"], f"step {self.steps_done + 1}, which is dropped")
        except MismatchError:
            if is_main():
                self.bank.drop(self.steps_done)
            raise
        self.steps_done += 1
        with watch("push"):  # the servers load while the anchor, the log and the checkpoint are brought up to date
            self.sync.begin_push(version=self.steps_done)
        with watch("anchor"):
            if self.anchor:
                self.anchor.update()
        if self.log:
            self.log.samples(self.steps_done, groups)
        return metrics | kl | rollout_metrics(groups) | pushed

    def train(self) -> Path:
        """All steps that are left; returns the exported Hugging Face folder."""
        cfg = self.cfg
        self.trace.take_busy_s()  # an evaluation before the first step is not part of it
        bar = tqdm(total=cfg.rl.steps, initial=self.steps_done, desc="rl", unit="step", disable=not is_main())
        while self.steps_done < cfg.rl.steps:
            began = time.monotonic()
            try:
                metrics = self.step()
            except Stopped:
                self._save()
                raise
            self._rewards.append(metrics["reward"])
            seconds = self.watch.lap()
            ended = time.monotonic()
            self.trace.span("steps", f"step {self.steps_done}", began, ended)
            metrics |= self._idle_shares(seconds, ended - began)
            metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
            metrics["weight_version"] = self.steps_done
            metrics["generate_tokens_per_s"] = metrics["num_response_tokens"] / seconds["generate"]
            metrics["train_tokens_per_s"] = metrics["num_response_tokens"] / (seconds["anchor"] + seconds["train"])
            if self.log:
                self.log.log(self.steps_done, metrics)
                bar.set_postfix_str(
                    f"reward {metrics['reward']:.3f}, entropy {metrics['entropy']:.3f}, "
                    f"mismatch {metrics['logprob_diff']:.1e}",
                    refresh=False,
                )
                bar.update()
            # After the log: a run that is killed in between and resumes from here would lack the step's line.
            if cfg.rl.checkpoint.due(self.steps_done, cfg.rl.steps):
                with self.watch("checkpoint"):
                    self._save()
        bar.close()
        self._finish_push()
        self.engine.save_hf(self.folder / "hf")
        return self.folder / "hf"

    def close(self) -> None:
        self.sync.close()
        if self.log:
            self.log.close()

    def _hold(self, logprob_diff: float, where: str) -> None:
        if logprob_diff <= self.max_logprob_diff:
            return
        raise MismatchError(
            f"{where}: the mean |trainer - servers| of logprobs is {logprob_diff:.3g}, above rl.max_logprob_diff = "
            f"{self.max_logprob_diff:g}: the servers compute another function (weights that were not renewed, another "
            "config.json or dtype), and would teach a wrong one. `t1 sync-check --perturb` tells which server does; a "
            "higher bound, or 0, goes on all the same"
        )

    def _save(self) -> None:
        """A checkpoint of the steps done, unless it is there already."""
        if not self._rewards:
            return
        checkpoint.save(
            self.folder / "checkpoints",
            self.steps_done,
            self.engine,
            self.anchor,
            {"seed": self.cfg.seed, "weight_version": self.steps_done, "settings": self.settings},
            self.cfg.rl.checkpoint,
            score=float(np.mean(self._rewards)),
        )
        self._rewards.clear()
        if is_main():
            self.bank.drop_before(self.steps_done)

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

    def _collect(self) -> list[Group]:
        """The step's graded samples, on every rank. Servers that are all lost are brought back and asked for the rest.

        Raises:
            Stopped: rank 0 was asked to stop.
            ServerError: the servers were lost `_MAX_OUTAGES` times.
        """
        weights = self.sync.plan.fingerprint()
        for _ in range(_MAX_OUTAGES):
            self._on_main(self._await_servers)
            for name in self.sync.bring_up():
                print(f"server {name} holds weights {self.steps_done} and is asked from now on", flush=True)
            groups = self._on_main(partial(self._generate, weights))
            if groups is not None:
                return groups
        raise ServerError(f"all servers were lost {_MAX_OUTAGES} times in step {self.steps_done + 1}; see their logs")

    def _on_main(self, job: Callable[[], T]) -> T:
        """What `job` returns on rank 0, on every rank; Stopped on all of them when rank 0 was asked to stop in it."""
        outcome: tuple[str, Any] | None = None
        if self.rank0:
            try:
                with STOP.interruptible():
                    outcome = ("done", job())
            except Stopped:
                outcome = ("stopped", None)
        what, result = from_main(outcome)
        if what == "stopped":
            raise Stopped
        return result

    def _await_servers(self) -> None:
        """Rank 0: starts lost servers anew, and waits when none is left. They have no weights yet: `bring_up` does."""
        assert self.rank0 is not None
        servers = self.rank0.servers
        for server in servers.revive():
            warn(f"server {server.name} is new, or was lost and is started again: it gets the current weights first")
        if not servers.usable():
            servers.wait_ready(minimum=1)

    def _generate(self, weights: str) -> list[Group] | None:
        """Rank 0: the groups; None when all servers were lost."""
        assert self.rank0 is not None
        cfg = self.cfg
        seed = cfg.seed * 1_000_003 + self.steps_done
        reward = asdict(cfg.reward) | cfg.reward.deciding()
        bank = self.bank.step(self.steps_done, weights, asdict(cfg.sampling), reward)
        try:
            return self.rank0.generate(self.batch(self.steps_done), cfg.sampling, seed, bank)
        except NoServerLeftError as error:
            warn(f"{error}\nThey are started again; the samples that were finished are kept.")
            return None

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a step: each epoch a permutation of its own, its incomplete last batch left out."""
        size = self.cfg.rl.prompts_per_step
        epoch, position = divmod(step, len(self.prompts) // size)
        order = np.random.default_rng((self.cfg.seed, epoch)).permutation(len(self.prompts))
        return [self.prompts[i] for i in order[position * size : (position + 1) * size]]
