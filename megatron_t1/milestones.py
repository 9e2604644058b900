"""What is measured every so many steps of RL: held-out accuracy and the distance from the starting policy; and the
snapshots, which offline measurements (scaling curves along the training) need.

A measurement belongs to the weights before a step, as the step's samples do, and stands in that step's line of metrics;
that of the final weights, after which no step comes, in evaluate/step_N alone.
The questions and their seeds are the same each time, so two of them differ by the weights alone. Finished responses are
kept: a run that resumes in the middle of one goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_t1.config import Config
from megatron_t1.data.packing import sequences_of
from megatron_t1.data.template import Template
from megatron_t1.engine.step import Engine, ForwardEngine
from megatron_t1.evaluation.evaluate import evaluate
from megatron_t1.evaluation.questions import question_sets
from megatron_t1.evaluation.samplers import ServerSampler
from megatron_t1.rank0 import Rank0
from megatron_t1.rollout.client import NoServerLeftError
from megatron_t1.types import Group
from megatron_t1.warn import warn


class Milestones:
    """Every method but `evaluate` is collective over the trainer's ranks."""

    def __init__(self, cfg: Config, engine: Engine, rank0: Rank0 | None) -> None:
        """
        Raises:
            ValueError: measurements are asked for, and there are no questions.
        """
        self._cfg, self._engine = cfg, engine
        self._start = Path(cfg.model.hf_path)
        if not cfg.rl.measure_every or rank0 is None:
            return
        self._sampler = ServerSampler(rank0, Template(self._start, cfg.data))
        self._sets = question_sets(cfg, cfg.evaluate.sets)

    def due(self, step: int) -> bool:
        every = self._cfg.rl.measure_every
        return every > 0 and step % every == 0

    def evaluate(self, step: int, weights: str) -> dict[str, float]:
        """Rank 0: accuracy of the servers' weights on every set; responses and summary go to evaluate/step_N.

        Args:
            step: steps that made the weights.
            weights: a digest of them: responses of others are never gone on with.
        """
        cfg, found = self._cfg, {}
        settings = {"step": step, "weights": weights, "reward": cfg.reward.deciding()}
        for name, questions in self._sets.items():
            folder = Path(cfg.run_dir) / "evaluate" / f"step_{step:06d}" / name
            sampling = cfg.evaluate.sampling_of(name)
            try:
                result = evaluate(
                    self._sampler, questions, folder, sampling, settings, cfg.seed, resume=True, replace_other=True
                )
            except NoServerLeftError as error:
                warn(f"{error}\nThe evaluation at step {step} is left out.")
                return {}
            found[f"heldout/{name}"] = result.pass_at_1
        return found

    def kl_to_start(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """KL(policy || starting policy) in nats a sample, from the first sample of every prompt; {} when none is due.

        On policy those are its own samples, so that the mean of their log-ratios is unbiased (sampling.cuts() aside).
        With rl.lag they are of weights some steps older: the mean is biased.
        """
        if not self.due(step):
            return {}
        firsts = sequences_of([Group(prompt=group.prompt, samples=group.samples[:1]) for group in groups])
        policy = self._engine.logprobs(firsts)
        with self._engine.other_weights():
            ForwardEngine.load_weights(self._engine, self._start)  # an Engine's own would tell the optimizer
            start = self._engine.logprobs(firsts)
        return log_ratio_metrics(policy, start)

    def snapshot(self, step: int) -> None:
        """The policy as a Hugging Face folder, rl/snapshots/step_N, when one is due."""
        every = self._cfg.rl.snapshot_every
        if every and step % every == 0:
            self._engine.save_hf(Path(self._cfg.run_dir) / "rl" / "snapshots" / f"step_{step:06d}")


def log_ratio_metrics(policy: Sequence[np.ndarray], start: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over samples of sum_t (log policy - log start), its standard error, and the mean a token; nats.

    Both: float32 [num_response_tokens] of each sample, which the policy drew.
    """
    ratios = np.array([np.sum(p.astype(np.float64) - s) for p, s in zip(policy, start, strict=True)])
    metrics = {"kl_start": float(ratios.mean()), "kl_start_token": float(ratios.sum() / sum(map(len, policy)))}
    if len(ratios) > 1:
        metrics["kl_start_error"] = float(ratios.std(ddof=1) / len(ratios) ** 0.5)
    return metrics
