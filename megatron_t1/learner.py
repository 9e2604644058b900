"""The training half of RL: policy and anchor, and one optimizer step on graded samples. No servers here.

`rl.Trainer` feeds it from the servers, `replay` from the disk: the same lines, so that a replayed step is the run's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_t1 import plugins
from megatron_t1.algo import advantage
from megatron_t1.algo.loss import token_loss_of
from megatron_t1.config import Config
from megatron_t1.data.packing import sequences_of
from megatron_t1.engine import checkpoint
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.offload import Offload
from megatron_t1.engine.parallel import is_main
from megatron_t1.engine.prescore import prescore
from megatron_t1.engine.resume_check import data_identity, model_identity, named
from megatron_t1.engine.saving import Saver
from megatron_t1.engine.step import Engine
from megatron_t1.metrics import Stopwatch, rollout_metrics, staleness
from megatron_t1.platform.detect import Platform
from megatron_t1.reward.config import DECIDING
from megatron_t1.types import Group, Prompt


class Learner:
    """Collective over the trainer's ranks, as are its methods."""

    def __init__(self, cfg: Config, platform: Platform, watch: Stopwatch) -> None:
        """The policy of `model.hf_path`, with an anchor that equals it. `watch` measures the stages of a step."""
        self.cfg, self.watch = cfg, watch
        self.checkpoints = Path(cfg.run_dir) / "rl" / "checkpoints"
        self.token_loss = token_loss_of(cfg.loss)
        self.saver = Saver(self.checkpoints, cfg.rl.checkpoint)
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
        self.offload = Offload(self.engine, self.anchor)
        self.settings: dict[str, Any] = {}
        self.steps_done = 0
        self._before: list[torch.Tensor] = []

    def resume(self, prompts: list[Prompt]) -> None:
        """Go on from the newest checkpoint of the run, if there is one.

        Raises:
            ValueError: there is one and `resume` was not asked for, or it is of other settings; or a prompt has a token
                that the model has no row for.
        """
        self.engine.check_tokens(prompt.token_ids for prompt in prompts)
        self.settings = _settings(self.cfg, prompts) if is_main() else {}
        path = checkpoint.to_resume(
            self.checkpoints,
            allowed=self.cfg.resume,
            settings=self.settings,
            may_change=self.cfg.resume_with_changes,
        )
        if path:
            self.steps_done = int(checkpoint.load(path, self.engine, self.anchor)["step"])

    def learn(self, groups: list[Group]) -> dict[str, float]:
        """One optimizer step. Returns its metrics, the same on every rank. `follow` comes next.

        Raises:
            Stopped: rank 0 was asked to stop; no step was taken.
            FloatingPointError: as `Engine.step`.
        """
        cfg, watch = self.cfg, self.watch
        with watch("pack"):
            advantage.assign(groups, cfg.loss.advantage)
            sequences = sequences_of(groups)
            microbatches = self.engine.pack(sequences)
            balance = self.engine.balance(microbatches, sequences)
        with watch("anchor"):
            kl = prescore(self.engine, self.anchor, microbatches, sequences, cfg.loss)
        with watch("train"):
            if cfg.awaits_batches:
                self._before = [tensor.detach().to("cpu", copy=True) for tensor in self.engine.tensors()]
            num_targets = sum(len(sequence.response_ids) for sequence in sequences)
            anchor = self.anchor.chunks if self.anchor else None
            metrics = self.engine.step(microbatches, num_targets, self.token_loss, anchor)
        stale = staleness(groups, self.steps_done)
        self.steps_done += 1
        return metrics | kl | balance | rollout_metrics(groups) | {"staleness": stale}

    def follow(self) -> None:
        """Move the anchor towards the new policy."""
        with self.watch("anchor"):
            if self.anchor:
                self.anchor.update()

    @contextlib.contextmanager
    def before_last_step(self) -> Iterator[None]:
        """Inside, the policy has the weights from before the last step, which servers were making a batch with."""
        with self.engine.other_weights() as tensors:
            torch._foreach_copy_(tensors, self._before)
            yield

    def begin_save(self, score: float) -> None:
        """A checkpoint of the steps done; `score`: how good they were, higher is better. `saver` finishes it."""
        state = {"seed": self.cfg.seed, "weight_version": self.steps_done, "settings": self.settings}
        self.saver.begin(self.steps_done, self.engine, self.anchor, state, score=score)


def _settings(cfg: Config, prompts: list[Prompt]) -> dict[str, Any]:
    rows = ((p.id, p.token_ids.tobytes(), p.gold, p.mode, *p.choices) for p in prompts)
    return named(
        **{"data.train": data_identity(rows), "seed": cfg.seed, "rl.prompts_per_step": cfg.rl.prompts_per_step},
        **{"rl.lag": cfg.rl.lag, "rl.refill": cfg.rl.refill},
        **{"rl.steps": None if cfg.rl.optim.schedule == "constant" else cfg.rl.steps},  # as far as a rate rests on them
        **{"model": model_identity(cfg.model), "model.dtype": cfg.model.dtype, "rl.optim": cfg.rl.optim},
        sampling=cfg.sampling,
        loss=cfg.loss,
        anchor=cfg.anchor,
        **{f"reward.{name}": getattr(cfg.reward, name) for name in DECIDING},
        plugins=plugins.identity(),
    )
