"""The regularizer's anchor: an exponential moving average of the policy, sharded like it.

anchor <- decay x anchor + (1 - decay) x policy after every step. The average is held in float32 (in bfloat16 a step's
small difference would be lost to rounding); a copy in the model's precision computes the forward pass. At decay 1
nothing moves, and the copy is all there is.

`fill` writes its logprobs and T1's centred KL (`algo.kl`) onto the microbatches, before the first backward. The KL is
the policy's, so the policy is asked too, in the same way: the servers' logprobs are of another distribution where top_p
or min_p cut it, and of another precision. With anchor = policy every KL is 0.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.head.fused import logprob_entropy_nograd
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.kl import centered
from megatron_t1.engine.config import AnchorConfig
from megatron_t1.engine.model import build_model
from megatron_t1.engine.step import Engine
from megatron_t1.types import Microbatch, TrainSequence


class Anchor:
    """Every method is collective over the trainer's ranks."""

    def __init__(self, engine: Engine, cfg: AnchorConfig) -> None:
        self._engine, self._decay = engine, cfg.decay
        _, self.chunks = build_model(engine.model_config, engine.spec, engine.parallel, engine.platform)
        # They keep requires_grad, though nothing asks for gradients: Megatron multiplies with frozen weights in another
        # way, whose rounding would part the anchor from a policy that it equals.
        self.weights = [param for chunk in self.chunks for param in chunk.parameters()]
        self._policy = [param for chunk in engine.chunks for param in chunk.parameters()]
        moves = cfg.decay < 1
        self.average = [w.detach().float() if moves and w.dtype != torch.float32 else w for w in self.weights]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make the anchor the present policy."""
        torch._foreach_copy_(self.average, self._policy)
        self.publish()

    @torch.no_grad()
    def update(self) -> None:
        if self._decay < 1:
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

    def fill(
        self, microbatches: list[Microbatch], sequences: list[TrainSequence], loss: LossConfig
    ) -> dict[str, float]:
        """Set on this rank's microbatches (on the last pipeline stage) what `loss` needs of the anchor:
        `anchor_logprob`, and `anchor_hidden` for the full-vocabulary KL or `centered_kl` for T1's.

        Args:
            sequences: those of the whole step, which `sample_index` of the microbatches counts along.

        Returns:
            For `kl_estimator="centered"`, mean and standard deviation over all samples of the KL in nats; {} else.
        """

        def logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> torch.Tensor:
            return logprob_entropy_nograd(hidden, head, microbatch.target_positions, microbatch.targets)[0]

        def anchor_logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> torch.Tensor:
            if loss.kl_estimator == "full":
                microbatch.anchor_hidden = hidden.cpu()
            return logprobs(hidden, head, microbatch)

        of_anchor = self._engine.map_hidden(self.chunks, microbatches, anchor_logprobs)
        for microbatch, anchor_logprob in zip(microbatches, of_anchor, strict=False):  # on other stages there are none
            microbatch.anchor_logprob = anchor_logprob
        if loss.kl_estimator != "centered":
            return {}
        of_policy = self._engine.map_hidden(self._engine.chunks, microbatches, logprobs)
        differences = [policy - anchor for policy, anchor in zip(of_policy, of_anchor, strict=True)]
        kl = self._sums(microbatches, differences, len(sequences))
        c = centered(kl, np.array([sequence.group for sequence in sequences]), loss.kl_baseline)
        of_samples = torch.from_numpy(c).float().to(self._engine.platform.device)
        for microbatch in microbatches:
            microbatch.centered_kl = of_samples[microbatch.sample_index]
        return {"kl_sample": float(kl.mean()), "kl_sample_std": float(kl.std())}

    def _sums(self, microbatches: list[Microbatch], values: list[torch.Tensor], num_samples: int) -> np.ndarray:
        """Of per-token values of the last stage's ranks, the sums by sample on every rank: float64 [num_samples].

        A sample lies whole on one rank and is added up on the host, token by token, so that neither layout nor packing
        nor the order of a GPU's atomics is in the result.
        """
        sums = torch.zeros(num_samples, dtype=torch.float64)
        if mpu.get_tensor_model_parallel_rank() == 0:
            for microbatch, of_tokens in zip(microbatches, values, strict=False):
                sums.index_add_(0, microbatch.sample_index.cpu(), of_tokens.double().cpu())
        sums = sums.to(self._engine.platform.device)
        dist.all_reduce(sums)
        return sums.cpu().numpy()
