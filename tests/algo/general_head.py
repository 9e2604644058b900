"""The head with gradients for any loss, to hold the fused one to: its backward recomputes each tile.

4 GEMMs [T,H]x[H,V] where `fused_loss` has 3; of its logits as little is alive as in `logprob_entropy_nograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_t1.algo.head.fused import TILE_LOGITS, _kernels, _models, _statistics, _tiles, logprob_entropy_nograd
from megatron_t1.algo.head.layout import AnchorHead, Head, WeightGradient, add_gradients, hand_back, select


def logprob_entropy(
    hidden: Tensor, head: Head, positions: Tensor, targets: Tensor, anchor: AnchorHead | None = None
) -> tuple[Tensor, ...]:
    """`logprob_entropy_nograd`, differentiable in hidden and weight."""
    if torch.is_grad_enabled():
        return _TokenValues.apply(hidden, head.weight, head, positions, targets, anchor)
    return logprob_entropy_nograd(hidden, head, positions, targets, anchor)


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, positions, targets, anchor):
        kernels, x = _kernels(hidden.device, anchor), select(hidden, head, positions)
        models = _models(x, head, positions, targets, anchor)
        stats = _statistics(kernels, models, _tiles(models, TILE_LOGITS[x.device.type]))
        ctx.save_for_backward(x, stats, positions, targets)
        ctx.head, ctx.anchor, ctx.hidden_shape, ctx.dtype = head, anchor, hidden.shape, hidden.dtype
        return kernels.token_values(stats)

    @staticmethod
    def backward(ctx, *grads):
        x, stats, positions, targets = ctx.saved_tensors
        head, kernels = ctx.head, _kernels(x.device, ctx.anchor)
        grads = tuple(g / head.temperature for g in grads)
        dx = torch.zeros_like(x, dtype=stats.dtype)
        dw = WeightGradient(head, head.weight.dtype, 1.0) if ctx.needs_input_grad[1] else None
        models = _models(x, head, positions, targets, ctx.anchor)
        for rows, tiles in _tiles(models, TILE_LOGITS[x.device.type]):
            add_gradients(kernels.logits_to_gradient(stats, grads, tiles, x.dtype), x, head, rows, dx, dw)
        return (
            hand_back(dx, head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd(torch.ones(())) if dw else None,
            *(None,) * 4,
        )
