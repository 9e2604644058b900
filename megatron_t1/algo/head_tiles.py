"""One tile of logits in plain torch: its share of the softmax statistics, its gradient.

Statistics of a token are four float32 numbers streamed over the vocabulary: M the maximum logit, S = sum e^(z-M), the
centred sum A = sum e^(z-M) (z-M), and the target's logit. They give logprob = (z_y - M) - ln S and entropy = ln S -
A/S. M and S are never folded into one log-sum-exp: with logits of 1e5 that would round ln S away.

`head_triton` has the two tile functions as CUDA kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_t1.algo.head_gemm import accumulation_dtype


def new_statistics(num_tokens: int, like: Tensor) -> Tensor:
    """[4, num_tokens]: rows M, S, A, z_y before any logit was seen.

    M starts finite so that an empty shard merges without inf - inf; z_y = -inf makes a target outside the vocabulary
    loud.
    """
    stats = torch.zeros(4, num_tokens, dtype=accumulation_dtype(like.dtype), device=like.device)
    stats[0] = torch.finfo(stats.dtype).min
    stats[3] = -torch.inf
    return stats


def merge_statistics(parts: Tensor) -> Tensor:
    """[n, 4, T] -> [4, T]; rescales every part to the common maximum, in the order given."""
    m, s, a, z_y = parts.unbind(1)
    top = m.amax(0)
    shift = m - top
    factor = shift.exp()
    return torch.stack([top, (factor * s).sum(0), (factor * (a + shift * s)).sum(0), z_y.amax(0)])


def update_statistics(stats: Tensor, z: Tensor, column: int, targets: Tensor, scratch: Tensor) -> Tensor:
    """Add logits z [T, n] of vocabulary entries column ... column + n - 1 to `stats`, in place.

    Returns shift [T]; z is left holding z - shift, which saves a pass over memory. `scratch` is flat, of at least T n.
    """
    local = targets - column
    inside = (local >= 0) & (local < z.shape[1])
    z_y = torch.where(inside, z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1), stats[3])
    tile_max = z.amax(1)
    z.sub_(tile_max[:, None])
    e = torch.exp(z, out=scratch[: z.numel()].view_as(z))
    part = torch.stack([tile_max, e.sum(1), e.mul_(z).sum(1), z_y])
    stats.copy_(merge_statistics(torch.stack([stats, part])))
    return tile_max


def logits_to_gradient_(
    z: Tensor,
    shift: Tensor | None,
    stats: Tensor,
    column: int,
    targets: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Turn z - shift [T, n] into dz = g_logprob (delta - p) - g_entropy p (ln p + entropy), in place.

    With p = e^(z-M)/S and ln p + entropy = (z-M) - A/S this is e^(z-M) (slope (z-M) + offset), plus g_logprob at the
    target.
    """
    m, s, a, _ = stats
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    z.sub_((m if shift is None else m - shift)[:, None])
    e = torch.exp(z, out=scratch[: z.numel()].view_as(z))
    z.mul_(slope[:, None]).add_(offset[:, None]).mul_(e)
    local = targets - column
    inside = (local >= 0) & (local < z.shape[1])
    z.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, g_logprob, 0.0)[:, None])
    return z
