"""Full-vocabulary KL to the anchor beside logprob and entropy, vocabulary-parallel and never [tokens, vocabulary].

    KL(policy||anchor) = sum_v p_v (ln p_v - ln q_v)

It costs the anchor's hidden states and output layer at training time: 2 G in the forward, 4 G in the backward, where
the sampled estimators of `loss` need one logprob a token. Gradients go to the policy only. Plain torch on any device.

With z and u the logits of policy and anchor, centred on their own maxima M and M', and d = (z - M) - (u - M'), the one
number to carry beyond the statistics of both is B = sum e^(z-M) d: KL = B/S - ln S + ln S', dKL/dz_v = p_v (d_v - B/S).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_t1.algo.fused_head import TILE_LOGITS
from megatron_t1.algo.head import Head, WeightGradient, add_gradients, hand_back, select
from megatron_t1.algo.head_tiles import logits_to_gradient, merge_statistics, new_statistics, update_statistics


def logprob_entropy_kl(
    hidden: Tensor, head: Head, anchor_hidden: Tensor, anchor_head: Head, positions: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`logprob_entropy`, and KL(policy||anchor) [T] of the same positions, all differentiable in hidden and weight.

    Args:
        anchor_hidden, anchor_head: as hidden and head, of the anchor; the same vocabulary rows on each rank. Constants.
    """
    if head.num_rows != anchor_head.num_rows or head.vocab_start != anchor_head.vocab_start:
        raise ValueError(
            f"policy rows [{head.vocab_start}, +{head.num_rows}) and anchor rows [{anchor_head.vocab_start},"
            f" +{anchor_head.num_rows}) differ; give both models the same tensor-parallel layout"
        )
    return _LogprobEntropyKl.apply(hidden, head.weight, head, anchor_hidden, anchor_head, positions, targets)


def _scaled_logits(head: Head, x: Tensor, tile: slice) -> Tensor:
    scaled_x, scale = head.prepare(x)
    return head.logits(scaled_x, tile, head.tile_memory(x, [tile])).mul_(scale)


def _merge(parts: Tensor) -> Tensor:
    """[n, 9, T] -> [9, T]: the policy's four statistics, the anchor's four, B."""
    policy, anchor = merge_statistics(parts[:, :4]), merge_statistics(parts[:, 4:8])
    shift = parts[:, 0] - policy[0]
    # d is centred on two maxima, so B moves with both.
    moved = parts[:, 8] + (shift - (parts[:, 4] - anchor[0])) * parts[:, 1]
    return torch.cat([policy, anchor, (shift.exp() * moved).sum(0)[None]])


class _LogprobEntropyKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, anchor_hidden, anchor_head, positions, targets):
        x, y = select(hidden, head, positions), select(anchor_hidden, anchor_head, positions)
        empty = new_statistics(len(x), x)
        stats = torch.cat([empty, empty, torch.zeros_like(empty[:1])])
        for tile in head.tiles(len(x), TILE_LOGITS[x.device.type]):
            column = head.vocab_start + tile.start
            z, u = _scaled_logits(head, x, tile), _scaled_logits(anchor_head, y, tile)
            part = torch.cat([empty, empty, torch.zeros_like(empty[:1])])
            update_statistics(part[:4], z, 1.0, column, targets)  # centres z and u in place
            update_statistics(part[4:8], u, 1.0, column, targets)
            part[8] = z.exp().mul_(z - u).sum(1)
            stats = _merge(torch.stack([stats, part]))
        if head.tp_group is not None:
            parts = stats.new_empty(head.tp_group.size(), *stats.shape)
            dist.all_gather_into_tensor(parts.flatten(0, 1), stats, group=head.tp_group)
            stats = _merge(parts)
        ctx.save_for_backward(x, y, stats, positions, targets)
        ctx.head, ctx.anchor_head, ctx.hidden_shape, ctx.dtype = head, anchor_head, hidden.shape, hidden.dtype
        m, s, a, z_y, _, anchor_s, _, _, b = stats
        return (z_y - m) - s.log(), s.log() - a / s, b / s - s.log() + anchor_s.log()

    @staticmethod
    def backward(ctx, g_logprob, g_entropy, g_kl):
        x, y, stats, positions, targets = ctx.saved_tensors
        head, anchor_head = ctx.head, ctx.anchor_head
        g_logprob, g_entropy, g_kl = (g / head.temperature for g in (g_logprob, g_entropy, g_kl))
        m, s, _, _, anchor_m, _, _, _, b = stats
        dx = torch.zeros_like(x, dtype=stats.dtype)
        dw = WeightGradient(head, head.weight.dtype) if ctx.needs_input_grad[1] else None
        for tile in head.tiles(len(x), TILE_LOGITS[x.device.type]):
            column = head.vocab_start + tile.start
            z, u = _scaled_logits(head, x, tile), _scaled_logits(anchor_head, y, tile)
            z.sub_(m[:, None])
            d = z - u.sub_(anchor_m[:, None])
            d_kl = z.exp().mul_((g_kl / s)[:, None]).mul_(d.sub_((b / s)[:, None]))
            dz = logits_to_gradient(z, 1.0, m, stats[:4], column, targets, g_logprob, g_entropy, z.dtype)
            add_gradients(dz.add_(d_kl).to(x.dtype), x, head, tile, dx, dw)
        return (
            hand_back(dx, head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd() if dw else None,
            *(None,) * 5,
        )
