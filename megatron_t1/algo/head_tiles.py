"""One tile of logits in plain torch: its share of the softmax statistics, its gradient.

Statistics of a token are four numbers streamed over the vocabulary, in float32: M the maximum logit, S = sum
e^(z-M), the centred sum A = sum e^(z-M) (z-M), and the target's logit z_y. They give logprob = (z_y - M) - ln S and
entropy = ln S - A/S. M and S are never folded into one log-sum-exp: with logits of 1e5 that would round ln S away.

`head_triton` has `update_statistics` and `logits_to_gradient` as CUDA kernels; `for_device` picks.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron_t1.algo.head_gemm import accumulation_dtype


def for_device(device: torch.device) -> ModuleType:
    """The module whose two tile functions serve this device."""
    if device.type == "cuda":
        from megatron_t1.algo import head_triton

        return head_triton
    import megatron_t1.algo.head_tiles as here

    return here


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


def _place(targets: Tensor, column: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column [T, 1] in a tile, clamped into it, and whether it lies there at all [T]."""
    local = targets - column
    return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)


def update_statistics(stats: Tensor, z: Tensor, scale: float, column: int, targets: Tensor) -> Tensor | None:
    """Add the logits scale * z [T, n] of vocabulary entries column ... column + n - 1 to `stats`, in place.

    Returns shift [T]; z is left holding scale * z - shift, which saves a pass over memory (None: z was left as it was).
    """
    if scale != 1.0:
        z.mul_(scale)
    where, inside = _place(targets, column, z.shape[1])
    z_y = torch.where(inside, z.gather(1, where).squeeze(1), stats[3])
    tile_max = z.amax(1)
    e = z.sub_(tile_max[:, None]).exp()
    part = torch.stack([tile_max, e.sum(1), e.mul_(z).sum(1), z_y])
    stats.copy_(merge_statistics(torch.stack([stats, part])))
    return tile_max


def logits_to_gradient(
    z: Tensor,
    scale: float,
    shift: Tensor | None,
    stats: Tensor,
    column: int,
    targets: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """dz [T, n] = g_logprob (delta - p) - g_entropy p (ln p + entropy), in `dtype`; z is used up.

    `shift` is what `update_statistics` returned for this tile, or None when z are logits that scale has still to be
    applied to. With p = e^(z-M)/S and ln p + entropy = (z-M) - A/S, dz is e^(z-M) (slope (z-M) + offset), plus
    g_logprob at the target.
    """
    m, s, a, _ = stats
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    if shift is not None:
        m = m - shift
    elif scale != 1.0:
        z.mul_(scale)
    e = z.sub_(m[:, None]).exp()
    z.mul_(slope[:, None]).add_(offset[:, None]).mul_(e)
    where, inside = _place(targets, column, z.shape[1])
    z.scatter_add_(1, where, torch.where(inside, g_logprob, 0.0)[:, None])
    return z.to(dtype)
