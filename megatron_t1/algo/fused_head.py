"""Output layer, temperature, logprob and entropy in one: from hidden states to losses, never [tokens, vocabulary].

Logits live one tile at a time (some vocabulary rows x some tokens). Three ways through, G = one GEMM [T,H]x[H,V]:

- `logprob_entropy_nograd`  1 G: statistics only (anchor logprobs, evaluation).
- `logprob_entropy`         4 G: differentiable; the backward recomputes each tile.
- `fused_loss`              3 G: a pointwise loss lets each chunk of tokens form its gradients in the forward, while
                            its logits are still there.

Tensor-parallel ranks gather 16 bytes a token and merge them in rank order: the same result, bit for bit, on every rank.
The parallel layouts themselves are in `head`, the arithmetic of a tile in `head_tiles`, full-vocabulary KL in
`full_kl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_t1.algo.head import Head, WeightGradient, add_gradients, hand_back, select
from megatron_t1.algo.head_gemm import accumulation_dtype
from megatron_t1.algo.head_tiles import for_device, merge_statistics, new_statistics
from megatron_t1.algo.loss import Metrics

TokenLoss = Callable[[Tensor, Tensor, Any], tuple[Tensor, Metrics]]
"""(logprob [n], entropy [n], tokens[a:b]) -> (loss [n], metrics)"""

TILE_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Logits alive at a time in the 1 G and 4 G paths: on CPUs what stays in the last-level cache."""
CHUNK_LOGITS = {"cpu": 75 * 2**20, "cuda": 320 * 2**20}
"""Logits alive at a time in the 3 G path: a chunk of tokens over all rows of this rank; 300 MiB and 1.25 GiB."""

_KeptTile = tuple[slice, Tensor, float, Tensor | None]
"""(rows, z, scale, shift) as `update_statistics` left them"""


def logprob_entropy(hidden: Tensor, head: Head, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob of each target and full-vocabulary entropy at head.temperature, differentiable in hidden and weight.

    Args:
        hidden: [s, H], or [s / tp, H] under sequence parallelism.
        positions: int64 [T], distinct places in the full stream of s whose output predicts `targets`; all others never
            reach the head. Equal on every rank of the tensor-parallel group.
        targets: int64 [T], global vocabulary entries; one outside the vocabulary gives logprob -inf.

    Returns:
        logprob [T], entropy [T] in nats; float32 (float64 if hidden is).
    """
    if torch.is_grad_enabled():
        return _LogprobEntropy.apply(hidden, head.weight, head, positions, targets)
    return logprob_entropy_nograd(hidden, head, positions, targets)


@torch.no_grad()
def logprob_entropy_nograd(hidden: Tensor, head: Head, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`logprob_entropy` without gradients: one GEMM and nothing kept."""
    x = select(hidden, head, positions)
    return _logprob_and_entropy(_statistics(x, head, targets, TILE_LOGITS[x.device.type])[0])


def fused_loss(
    hidden: Tensor,
    head: Head,
    positions: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    tokens: Any,
    *,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Sum over tokens of a pointwise loss, whose gradients are formed in this forward.

    Args:
        hidden, positions, targets: as in `logprob_entropy`.
        token_loss: loss of each token from its logprob, entropy and its own constants; it is called once for every
            chunk of tokens and must not mix tokens.
        tokens: the constants; `tokens[a:b]` is handed to token_loss.
        grad_scale: the gradient that the backward will bring to the returned sum (loss scale, 1 / num_microbatches, 1 /
            normaliser ...). Only needed where the weight has Megatron's `main_grad`: dW is added to it in this forward,
            already multiplied, so it must be known here.

    Returns:
        The sum (a scalar with gradient) and the metrics merged over chunks. Under torch.no_grad: no gradient, 1 G.

    Raises:
        RuntimeError: in the backward, when dW went into main_grad and the gradient that came is not `grad_scale`.

    The forward must be followed by exactly one backward: one that is run twice (activation recomputation around it)
    would add dW twice.
    """
    if not torch.is_grad_enabled():
        logprob, entropy = logprob_entropy_nograd(hidden, head, positions, targets)
        loss, metrics = token_loss(logprob, entropy, tokens[:])
        return loss.sum(), metrics
    parts: list[Metrics] = []
    total = _FusedLoss.apply(hidden, head.weight, head, positions, targets, token_loss, tokens, grad_scale, parts)
    return total, Metrics.merge(parts)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, positions, targets):
        x = select(hidden, head, positions)
        stats, _ = _statistics(x, head, targets, TILE_LOGITS[x.device.type])
        ctx.save_for_backward(x, stats, positions, targets)
        ctx.head, ctx.hidden_shape, ctx.dtype = head, hidden.shape, hidden.dtype
        return _logprob_and_entropy(stats)

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        x, stats, positions, targets = ctx.saved_tensors
        head, kernels = ctx.head, for_device(x.device)
        grads = g_logprob / head.temperature, g_entropy / head.temperature
        dx = torch.zeros_like(x, dtype=stats.dtype)
        dw = WeightGradient(head, head.weight.dtype) if ctx.needs_input_grad[1] else None
        scaled_x, scale = head.prepare(x)
        tiles = head.tiles(len(x), TILE_LOGITS[x.device.type])
        memory = head.tile_memory(x, tiles)
        for tile in tiles:
            z, column = head.logits(scaled_x, tile, memory), head.vocab_start + tile.start
            dz = kernels.logits_to_gradient(z, scale, None, stats, column, targets, *grads, x.dtype)
            add_gradients(dz, x, head, tile, dx, dw)
        return (
            hand_back(dx, head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd() if dw else None,
            *(None,) * 3,
        )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, positions, targets, token_loss, tokens, grad_scale, parts):
        x = select(hidden, head, positions)
        dtype, kernels = accumulation_dtype(x.dtype), for_device(x.device)
        dx = torch.zeros_like(x, dtype=dtype)
        dw = WeightGradient(head, dtype, grad_scale) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=dtype, device=x.device)
        chunks = _chunks(len(x), head)
        logits = x.new_empty((chunks[0].stop - chunks[0].start) * head.num_rows, dtype=dtype)
        for chunk in chunks:
            chunk_x, chunk_targets = x[chunk], targets[chunk]
            stats, kept = _statistics(chunk_x, head, chunk_targets, TILE_LOGITS[x.device.type] // 2, logits)
            logprob, entropy = (t.requires_grad_() for t in _logprob_and_entropy(stats))
            with torch.enable_grad():
                loss, metrics = token_loss(logprob, entropy, tokens[chunk])
                loss_sum = loss.sum()
            grads = torch.autograd.grad(loss_sum, (logprob, entropy), allow_unused=True, materialize_grads=True)
            grads = tuple(g / head.temperature for g in grads)
            total += loss_sum.detach()
            parts.append(metrics)
            while kept:  # the last logits made are still in the cache
                tile, z, scale, shift = kept.pop()
                column = head.vocab_start + tile.start
                dz = kernels.logits_to_gradient(z, scale, shift, stats, column, chunk_targets, *grads, x.dtype)
                add_gradients(dz, chunk_x, head, tile, dx[chunk], dw)
            if dw:
                dw.fresh = False
        ctx.save_for_backward(dx, positions)
        ctx.head, ctx.dw, ctx.hidden_shape, ctx.dtype = head, dw, hidden.shape, hidden.dtype
        return total

    @staticmethod
    def backward(ctx, g):
        dx, positions = ctx.saved_tensors
        dw, ctx.dw = ctx.dw, None  # a second reference would make autograd copy the gradient
        return (
            hand_back(dx * g, ctx.head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd(g) if dw else None,
            *(None,) * 7,
        )


def _chunks(num_tokens: int, head: Head) -> list[slice]:
    """Equal chunks of tokens whose logits over this rank's rows fit CHUNK_LOGITS; without tokens one empty chunk."""
    # Every rank of the group must cut alike, also one with nothing but padding: hence shape[0], not num_rows.
    most = max(CHUNK_LOGITS[head.weight.device.type] // head.weight.shape[0], 1)
    num_chunks = max(-(-num_tokens // most), 1)
    step = max(-(-num_tokens // num_chunks), 1)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, max(num_tokens, 1), step)]


def _statistics(
    x: Tensor, head: Head, targets: Tensor, max_logits: int, memory: Tensor | None = None
) -> tuple[Tensor, list[_KeptTile]]:
    """[4, T] over the vocabulary of all ranks; the logits are kept in `memory`, flat, of T x num_rows, if given."""
    stats, kernels, kept = new_statistics(len(x), x), for_device(x.device), []
    tiles = head.tiles(len(x), max_logits)
    one_tile = head.tile_memory(x, tiles if memory is None else [])
    scaled_x, scale = head.prepare(x)
    for tile in tiles:
        z = head.logits(scaled_x, tile, one_tile if memory is None else memory[len(x) * tile.start :])
        shift = kernels.update_statistics(stats, z, scale, head.vocab_start + tile.start, targets)
        if memory is not None:
            kept.append((tile, z, scale, shift))
    if head.tp_group is not None and head.tp_group.size() > 1:
        parts = stats.new_empty(head.tp_group.size(), *stats.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), stats, group=head.tp_group)
        stats = merge_statistics(parts)
    return stats, kept


def _logprob_and_entropy(stats: Tensor) -> tuple[Tensor, Tensor]:
    m, s, a, z_y = stats
    log_s = s.log()
    return (z_y - m) - log_s, log_s - a / s
