"""The regularizer's anchor: an exponential moving average of the policy, sharded like it.

anchor <- decay x anchor + (1 - decay) x policy after every step. The average is held in float32 (in bfloat16 a step's
small difference would be lost to rounding); a copy in the model's precision computes the forward pass.

`fill` writes its logprobs and T1's centred KL (`algo.kl`) onto the microbatches, before the first backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_t1.algo.head.fused import logprob_entropy_nograd
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.kl import centered
from megatron_t1.engine.config import AnchorConfig
from megatron_t1.engine.model import build_model
from megatron_t1.engine.step import Engine
from megatron_t1.types import Microbatch


class Anchor:
    """Every method is collective over the trainer's ranks."""

    def __init__(self, engine: Engine, cfg: AnchorConfig) -> None:
        self._engine, self._decay = engine, cfg.decay
        _, self.chunks = build_model(engine.model_config, engine.spec, engine.parallel, engine.platform)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self.weights = [param for chunk in self.chunks for param in chunk.parameters()]
        self._policy = [param for chunk in engine.chunks for param in chunk.parameters()]
        self.average = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make the anchor the present policy."""
        torch._foreach_copy_(self.average, self._policy)
        self.publish()

    @torch.no_grad()
    def update(self) -> None:
        for average, policy in zip(self.average, self._policy, strict=True):
            average.lerp_(policy.float(), 1.0 - self._decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the forward pass's weights up to the average; buffers (a router's biases) are the policy's."""
        for weight, average in zip(self.weights, self.average, strict=True):
            if weight is not average:
                weight.copy_(average)
        for chunk, policy in zip(self.chunks, self._engine.chunks, strict=True):
            for buffer, theirs in zip(chunk.buffers(), policy.buffers(), strict=True):
                buffer.copy_(theirs)

    def fill(self, microbatches: list[Microbatch], num_samples: int, *, keep_hidden: bool = False) -> None:
        """Set `anchor_logprob` and `centered_kl` on this rank's microbatches (on the last pipeline stage).

        Args:
            num_samples: samples of the whole step, over all ranks.
            keep_hidden: set `anchor_hidden` too, for `Engine.step` to compute the full-vocabulary KL from.
        """

        def logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> torch.Tensor:
            if keep_hidden:
                microbatch.anchor_hidden = hidden.cpu()
            return logprob_entropy_nograd(hidden, head, microbatch.target_positions, microbatch.targets)[0]

        computed = self._engine.map_hidden(self.chunks, microbatches, logprobs)
        kl = torch.zeros(num_samples, dtype=torch.float64, device=self._engine.platform.device)
        if not mpu.is_pipeline_last_stage():
            return
        for microbatch, anchor_logprob in zip(microbatches, computed, strict=True):
            microbatch.anchor_logprob = anchor_logprob
            difference = (microbatch.rollout_logprob - anchor_logprob).double()
            kl.index_add_(0, microbatch.sample_index, difference)
        dist.all_reduce(kl, group=mpu.get_data_parallel_group())
        kl = centered(kl)
        for microbatch in microbatches:
            microbatch.centered_kl = kl[microbatch.sample_index]
