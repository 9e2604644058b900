"""One tile of logits in plain torch: its share of the softmax statistics, its gradient.

Statistics of a token are four numbers streamed over the vocabulary, in float32: M the maximum logit, S = sum
e^(z-M), the centred sum A = sum e^(z-M) (z-M), and the target's logit z_y. They give logprob = (z_y - M) - ln S and
entropy = ln S - A/S. M and S are never folded into one log-sum-exp: with logits of 1e5 that would round ln S away.

The paths of `fused` know `TileMath` alone: this module is one, `triton_math` another (the two functions that touch
logits as CUDA kernels), `full_kl` and `triton_full_kl` the same with the anchor's tile beside the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_t1.algo.head.gemm import accumulation_dtype


@dataclass
class Tile:
    """Logits of T tokens over n neighbouring vocabulary entries: scale * z, less `shift` once that is set."""

    z: Tensor
    """[T, n], contiguous, float32 (float64 in tests)"""
    scale: float
    """what z has still to be multiplied by"""
    column: int
    """vocabulary entry of the first column"""
    targets: Tensor
    """int64 [T], vocabulary entries, in this tile or not"""
    shift: Tensor | None = None
    """[T]; once set, scale is applied and the logits are z + shift: it saves a pass over memory"""

    def target_columns(self) -> tuple[Tensor, Tensor]:
        """Each target's column [T, 1], clamped into the tile, and whether it lies there at all [T]."""
        width = self.z.shape[1]
        local = self.targets - self.column
        return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)

    def center(self, at: Tensor) -> Tensor:
        """The logits less `at` [T], in place."""
        if self.shift is not None:
            at, self.shift = at - self.shift, at
        else:
            self.shift = at
            if self.scale != 1.0:
                self.z.mul_(self.scale)
        return self.z.sub_(at[:, None])


class TileMath(Protocol):
    """What the paths need to know of a tile; `tiles` are the policy's and, for `full_kl`, the anchor's."""

    def new_statistics(self, num_tokens: int, like: Tensor) -> Tensor:
        """[k, num_tokens] before any logit was seen."""

    def update_statistics(self, stats: Tensor, tiles: Sequence[Tile]) -> None:
        """Add these logits to `stats`, in place; may centre the tiles."""

    def merge_statistics(self, parts: Tensor) -> Tensor:
        """[n, k, T] -> [k, T] of all parts together, rescaled to the common maximum in the order given."""

    def token_values(self, stats: Tensor) -> tuple[Tensor, ...]:
        """logprob, entropy (and KL), [T] each, from the statistics of the whole vocabulary."""

    def logits_to_gradient(
        self, stats: Tensor, grads: Sequence[Tensor], tiles: Sequence[Tile], dtype: torch.dtype
    ) -> Tensor:
        """Gradient with respect to the logits [T, n], in `dtype`, from those of the token values; uses the tiles up."""


def new_statistics(num_tokens: int, like: Tensor) -> Tensor:
    """Rows M, S, A, z_y.

    M starts finite so that an empty shard merges without inf - inf; z_y = -inf makes a target outside the vocabulary
    loud.
    """
    stats = torch.zeros(4, num_tokens, dtype=accumulation_dtype(like.dtype), device=like.device)
    stats[0] = torch.finfo(stats.dtype).min
    stats[3] = -torch.inf
    return stats


def merge_statistics(parts: Tensor) -> Tensor:
    m, s, a, z_y = parts.unbind(1)
    top = m.amax(0)
    shift = m - top
    factor = shift.exp()
    return torch.stack([top, (factor * s).sum(0), (factor * (a + shift * s)).sum(0), z_y.amax(0)])


def token_values(stats: Tensor) -> tuple[Tensor, Tensor]:
    m, s, a, z_y = stats
    log_s = s.log()
    return (z_y - m) - log_s, log_s - a / s


def update_statistics(stats: Tensor, tiles: Sequence[Tile]) -> None:
    (tile,) = tiles
    where, inside = tile.target_columns()
    z_y = torch.where(inside, tile.z.gather(1, where).squeeze(1) * tile.scale, stats[3])
    top = tile.z.amax(1) * tile.scale
    z = tile.center(top)
    e = z.exp()
    part = torch.stack([top, e.sum(1), e.mul_(z).sum(1), z_y])
    stats.copy_(merge_statistics(torch.stack([stats, part])))


def logits_to_gradient(stats: Tensor, grads: Sequence[Tensor], tiles: Sequence[Tile], dtype: torch.dtype) -> Tensor:
    """dz = g_logprob (delta - p) - g_entropy p (ln p + entropy).

    With p = e^(z-M)/S and ln p + entropy = (z-M) - A/S it is e^(z-M) (slope (z-M) + offset), plus g_logprob at the
    target.
    """
    (tile,), (g_logprob, g_entropy) = tiles, grads
    m, s, a, _ = stats
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    z = tile.center(m)
    e = z.exp()
    z.mul_(slope[:, None]).add_(offset[:, None]).mul_(e)
    where, inside = tile.target_columns()
    z.scatter_add_(1, where, torch.where(inside, g_logprob, 0.0)[:, None])
    return z.to(dtype)
