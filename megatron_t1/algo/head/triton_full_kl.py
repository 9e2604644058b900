"""`full_kl` with its two passes over the logits of policy and anchor as Triton kernels, which leave the tiles as they
were and keep nothing else of their size: in plain torch these passes cost more than the four GEMMs around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_t1.algo.head.full_kl import merge_statistics, new_statistics, token_values
from megatron_t1.algo.head.tile_math import Tile
from megatron_t1.algo.head.triton_math import BLOCK, OPTIONS

__all__ = ["logits_to_gradient", "merge_statistics", "new_statistics", "token_values", "update_statistics"]


@triton.jit
def _update_kernel(
    z_ptr, u_ptr, stats_ptr, targets_ptr, num_tokens, width, z_scale, u_scale, column, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    u_ptr += row * width
    m = tl.load(stats_ptr + row)
    s = tl.load(stats_ptr + num_tokens + row)
    a = tl.load(stats_ptr + 2 * num_tokens + row)
    anchor_m = tl.load(stats_ptr + 4 * num_tokens + row)
    anchor_s = tl.load(stats_ptr + 5 * num_tokens + row)
    anchor_a = tl.load(stats_ptr + 6 * num_tokens + row)
    b = tl.load(stats_ptr + 8 * num_tokens + row)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        valid = offsets < width
        z = tl.load(z_ptr + offsets, mask=valid, other=-float("inf")) * z_scale
        u = tl.load(u_ptr + offsets, mask=valid, other=-float("inf")) * u_scale
        top = tl.maximum(m, tl.max(z, 0))
        anchor_top = tl.maximum(anchor_m, tl.max(u, 0))
        z = tl.where(valid, z - top, 0.0)
        u = tl.where(valid, u - anchor_top, 0.0)
        e = tl.where(valid, tl.exp(z), 0.0)
        anchor_e = tl.where(valid, tl.exp(u), 0.0)
        shift, anchor_shift = m - top, anchor_m - anchor_top
        factor, anchor_factor = tl.exp(shift), tl.exp(anchor_shift)
        b = factor * (b + (shift - anchor_shift) * s) + tl.sum(e * (z - u), 0)
        a = factor * (a + shift * s) + tl.sum(e * z, 0)
        s = factor * s + tl.sum(e, 0)
        anchor_a = anchor_factor * (anchor_a + anchor_shift * anchor_s) + tl.sum(anchor_e * u, 0)
        anchor_s = anchor_factor * anchor_s + tl.sum(anchor_e, 0)
        m, anchor_m = top, anchor_top
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + num_tokens + row, s)
    tl.store(stats_ptr + 2 * num_tokens + row, a)
    tl.store(stats_ptr + 4 * num_tokens + row, anchor_m)
    tl.store(stats_ptr + 5 * num_tokens + row, anchor_s)
    tl.store(stats_ptr + 6 * num_tokens + row, anchor_a)
    tl.store(stats_ptr + 8 * num_tokens + row, b)
    local = tl.load(targets_ptr + row) - column
    if (local >= 0) & (local < width):
        tl.store(stats_ptr + 3 * num_tokens + row, tl.load(z_ptr + local) * z_scale)
        tl.store(stats_ptr + 7 * num_tokens + row, tl.load(u_ptr + local) * u_scale)


@triton.jit
def _gradient_kernel(
    z_ptr, u_ptr, dz_ptr, stats_ptr, targets_ptr, g_logprob_ptr, g_entropy_ptr, g_kl_ptr,
    num_tokens, width, z_scale, u_scale, column, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < width
    m = tl.load(stats_ptr + row)
    s = tl.load(stats_ptr + num_tokens + row)
    a = tl.load(stats_ptr + 2 * num_tokens + row)
    anchor_m = tl.load(stats_ptr + 4 * num_tokens + row)
    b = tl.load(stats_ptr + 8 * num_tokens + row)
    g_logprob = tl.load(g_logprob_ptr + row)
    g_entropy = tl.load(g_entropy_ptr + row)
    g_kl = tl.load(g_kl_ptr + row)
    z = tl.load(z_ptr + row * width + offsets, mask=valid, other=0.0) * z_scale - m
    u = tl.load(u_ptr + row * width + offsets, mask=valid, other=0.0) * u_scale - anchor_m
    slope = -g_entropy / s
    offset = (g_entropy * (a / s) - g_logprob) / s
    dz = tl.exp(z) * (slope * z + offset + g_kl / s * (z - u - b / s))
    dz += tl.where(offsets == tl.load(targets_ptr + row) - column, g_logprob, 0.0)
    tl.store(dz_ptr + row * width + offsets, dz.to(dz_ptr.dtype.element_ty), mask=valid)


def update_statistics(stats: Tensor, tiles: Sequence[Tile]) -> None:
    tile, anchor = tiles
    num_tokens, width = tile.z.shape
    if num_tokens:
        _update_kernel[(num_tokens,)](
            tile.z, anchor.z, stats, tile.targets, num_tokens, width, tile.scale, anchor.scale, tile.column,
            **OPTIONS,
        )  # fmt: skip


def logits_to_gradient(stats: Tensor, grads: Sequence[Tensor], tiles: Sequence[Tile], dtype: torch.dtype) -> Tensor:
    tile, anchor = tiles
    num_tokens, width = tile.z.shape
    dz = torch.empty_like(tile.z, dtype=dtype)
    if num_tokens:
        _gradient_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
            tile.z, anchor.z, dz, stats, tile.targets, *(g.contiguous() for g in grads),
            num_tokens, width, tile.scale, anchor.scale, tile.column, **OPTIONS,
        )  # fmt: skip
    return dz
