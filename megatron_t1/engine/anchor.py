"""The regularizer's anchor: an exponential moving average of the policy, sharded like it.

anchor <- decay x anchor + (1 - decay) x policy after every step. The average is held in float32 (in bfloat16 a step's
small difference would be lost to rounding); a copy in the model's precision computes the forward pass. At decay 1
nothing moves, and the copy is all there is.

What is averaged is the policy that computes, in bfloat16 a rounding of the optimizer's float32 weights. At 1.5e-6 a
weight moves by a whole bfloat16 step once in many steps, and the published anchor follows 69 steps later (half of a
change, at 0.99): a delayed staircase rather than a smooth average, without drift.
"""

from __future__ import annotations

import torch

from megatron_t1.engine.config import AnchorConfig
from megatron_t1.engine.model import build_model
from megatron_t1.engine.step import Engine


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
