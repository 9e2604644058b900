"""`tile_math` with its two passes over logits as Triton kernels: one read for the statistics, one read and one narrow
write for the gradient; tiles are left as they were. The GEMMs stay with cuBLAS.

Checked against float64 under Triton's interpreter (TRITON_INTERPRET=1) on the CPU, and on an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_t1.algo.head.tile_math import Tile, merge_statistics, new_statistics, token_values

__all__ = ["logits_to_gradient", "merge_statistics", "new_statistics", "token_values", "update_statistics"]

BLOCK = 2048
# z * scale - M must not become one fused operation: M is the rounded product, and with large logits the top token's
# e^(z-M) would not be 1.
OPTIONS = {"BLOCK": BLOCK, "enable_fp_fusion": False}


@triton.jit
def _update_kernel(z_ptr, stats_ptr, targets_ptr, num_tokens, width, scale, column, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    m = tl.load(stats_ptr + row)
    s = tl.load(stats_ptr + num_tokens + row)
    a = tl.load(stats_ptr + 2 * num_tokens + row)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        valid = offsets < width
        z = tl.load(z_ptr + offsets, mask=valid, other=-float("inf")) * scale
        top = tl.maximum(m, tl.max(z, 0))
        centred = tl.where(valid, z - top, 0.0)
        e = tl.where(valid, tl.exp(centred), 0.0)
        factor = tl.exp(m - top)
        a = factor * (a + (m - top) * s) + tl.sum(e * centred, 0)
        s = factor * s + tl.sum(e, 0)
        m = top
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + num_tokens + row, s)
    tl.store(stats_ptr + 2 * num_tokens + row, a)
    local = tl.load(targets_ptr + row) - column
    if (local >= 0) & (local < width):
        tl.store(stats_ptr + 3 * num_tokens + row, tl.load(z_ptr + local) * scale)


@triton.jit
def _gradient_kernel(
    z_ptr, dz_ptr, stats_ptr, targets_ptr, g_logprob_ptr, g_entropy_ptr, num_tokens, width, scale, column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < width
    m = tl.load(stats_ptr + row)
    s = tl.load(stats_ptr + num_tokens + row)
    a = tl.load(stats_ptr + 2 * num_tokens + row)
    g_logprob = tl.load(g_logprob_ptr + row)
    g_entropy = tl.load(g_entropy_ptr + row)
    centred = tl.load(z_ptr + row * width + offsets, mask=valid, other=0.0) * scale - m
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    dz = tl.exp(centred) * (slope * centred + offset)
    dz += tl.where(offsets == tl.load(targets_ptr + row) - column, g_logprob, 0.0)
    tl.store(dz_ptr + row * width + offsets, dz.to(dz_ptr.dtype.element_ty), mask=valid)


def update_statistics(stats: Tensor, tiles: Sequence[Tile]) -> None:
    (tile,) = tiles
    num_tokens, width = tile.z.shape
    if num_tokens:
        _update_kernel[(num_tokens,)](
            tile.z, stats, tile.targets, num_tokens, width, tile.scale, tile.column, **OPTIONS
        )


def logits_to_gradient(stats: Tensor, grads: Sequence[Tensor], tiles: Sequence[Tile], dtype: torch.dtype) -> Tensor:
    (tile,), (g_logprob, g_entropy) = tiles, grads
    num_tokens, width = tile.z.shape
    dz = torch.empty_like(tile.z, dtype=dtype)
    if num_tokens:
        _gradient_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
            tile.z, dz, stats, tile.targets, g_logprob.contiguous(), g_entropy.contiguous(),
            num_tokens, width, tile.scale, tile.column, **OPTIONS,
        )  # fmt: skip
    return dz
