"""One tile of logits in plain torch: its GEMMs, its share of the softmax statistics, its gradient.

Statistics of a token are four float32 numbers streamed over the vocabulary: M the maximum logit, S = sum e^(z-M), the
centred sum A = sum e^(z-M) (z-M), and the target's logit. They give logprob = (z_y - M) - ln S and entropy = ln S -
A/S. M and S are never folded into one log-sum-exp: with logits of 1e5 that would round ln S away.

`head_triton` has the same two tile functions as CUDA kernels. float64 inputs are computed in float64 throughout (for
tests).
"""

from __future__ import annotations

import torch
from torch import Tensor

_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower is accumulated in float32."""
    return torch.promote_types(dtype, torch.float32)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] in at least float32, whatever the operands' dtype (a narrower one on CUDA feeds tensor
    cores).

    On CPUs, oneDNN's strict fp32 GEMM is as fast as MKL's on Intel and about twice as fast elsewhere; bf16 operands are
    widened, because torch's CPU GEMM would round the result to bf16.
    """
    out_dtype = accumulation_dtype(b.dtype)
    if a.device.type == "cuda" and b.dtype != out_dtype:
        return torch.mm(a.to(b.dtype), b, out_dtype=out_dtype)
    a, b = a.to(out_dtype), b.to(out_dtype)
    if a.device.type == "cpu" and out_dtype == torch.float32 and _onednn_linear is not None and a.shape[0] > 0:
        return _onednn_linear(a, b.t(), None, "none", [], "")
    return a @ b


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


def update_statistics(stats: Tensor, z: Tensor, column: int, targets: Tensor) -> None:
    """Add logits z [T, n] of vocabulary entries column ... column + n - 1 to `stats`, in place; z is kept."""
    z_y = stats[3]
    local = targets - column
    inside = (local >= 0) & (local < z.shape[1])
    z_y = torch.where(inside, z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1), z_y)
    tile_max = z.amax(1)
    centred = z - tile_max[:, None]
    e = centred.exp()
    part = torch.stack([tile_max, e.sum(1), e.mul_(centred).sum(1), z_y])
    stats.copy_(merge_statistics(torch.stack([stats, part])))


def logits_to_gradient_(
    z: Tensor, stats: Tensor, column: int, targets: Tensor, g_logprob: Tensor, g_entropy: Tensor
) -> Tensor:
    """Turn logits z [T, n] into dz = g_logprob (delta - p) - g_entropy p (ln p + entropy), in place.

    With p = e^(z-M)/S and ln p + entropy = (z-M) - A/S this is e^(z-M) (slope (z-M) + offset), plus g_logprob at the
    target.
    """
    m, s, a, _ = stats
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    z.sub_(m[:, None])
    e = z.exp()
    z.mul_(slope[:, None]).add_(offset[:, None]).mul_(e)
    local = targets - column
    inside = (local >= 0) & (local < z.shape[1])
    z.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, g_logprob, 0.0)[:, None])
    return z
