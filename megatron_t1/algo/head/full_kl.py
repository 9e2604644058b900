"""`tile_math` with the anchor's tile beside the policy's: logprob, entropy and the full-vocabulary KL to the anchor.

    KL(policy||anchor) = sum_v p_v (ln p_v - ln q_v)

Gradients go to the policy only. Plain torch on any device; `triton_full_kl` has the same as CUDA kernels.

With z and u the logits of policy and anchor, centred on their own maxima M and M', and d = (z - M) - (u - M'), the one
number to carry beyond the statistics of both is B = sum e^(z-M) d: KL = B/S - ln S + ln S', dKL/dz_v = p_v (d_v - B/S).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_t1.algo.head import tile_math
from megatron_t1.algo.head.tile_math import Tile


def new_statistics(num_tokens: int, like: Tensor) -> Tensor:
    """Rows M, S, A, z_y of the policy, the same of the anchor, B."""
    empty = tile_math.new_statistics(num_tokens, like)
    return torch.cat([empty, empty, torch.zeros_like(empty[:1])])


def merge_statistics(parts: Tensor) -> Tensor:
    policy, anchor = (tile_math.merge_statistics(parts[:, rows]) for rows in (slice(0, 4), slice(4, 8)))
    shift = parts[:, 0] - policy[0]
    # d is centred on two maxima, so B moves with both.
    moved = parts[:, 8] + (shift - (parts[:, 4] - anchor[0])) * parts[:, 1]
    return torch.cat([policy, anchor, (shift.exp() * moved).sum(0)[None]])


def token_values(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s, anchor_s, b = stats[1], stats[5], stats[8]
    return *tile_math.token_values(stats[:4]), b / s - s.log() + anchor_s.log()


def update_statistics(stats: Tensor, tiles: Sequence[Tile]) -> None:
    part = new_statistics(stats.shape[1], stats)
    for tile, rows in zip(tiles, (part[:4], part[4:8]), strict=True):
        tile_math.update_statistics(rows, [tile])
    z, u = (tile.z for tile in tiles)  # centred now, each on its own maximum
    part[8] = (z - u).mul_(z.exp()).sum(1)
    stats.copy_(merge_statistics(torch.stack([stats, part])))


def logits_to_gradient(stats: Tensor, grads: Sequence[Tensor], tiles: Sequence[Tile], dtype: torch.dtype) -> Tensor:
    """That of `tile_math`, plus g_kl p (d - B/S)."""
    tile, anchor_tile = tiles
    m, s, anchor_m, b = stats[0], stats[1], stats[4], stats[8]
    g_logprob, g_entropy, g_kl = grads
    z = tile.center(m)
    d = torch.sub(z, anchor_tile.center(anchor_m), out=anchor_tile.z).sub_((b / s)[:, None])
    d.mul_(z.exp()).mul_((g_kl / s)[:, None])
    return tile_math.logits_to_gradient(stats[:4], (g_logprob, g_entropy), [tile], z.dtype).add_(d).to(dtype)
