"""Output layer, temperature, logprob and entropy in one: from hidden states to losses, never [tokens, vocabulary].

Logits live one tile at a time (some vocabulary rows x some tokens). Two ways through, G = one GEMM [T,H]x[H,V]:

- `logprob_entropy_nograd`  1 G: statistics only (anchor logprobs, evaluation).
- `fused_loss`              3 G: a pointwise loss lets each chunk of tokens form its gradients in the forward, while
                            its logits are still there.

Given the anchor's hidden states and output layer, both also give the full-vocabulary KL to it, at one G more wherever
logits are made.

Tensor-parallel ranks gather 16 bytes a token (36 with the KL) and merge them in rank order: the same result, bit for
bit, on every rank. The parallel layouts themselves are in `layout`, the arithmetic of a tile in `tile_math`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_t1.algo.config import CHUNK_LOGITS
from megatron_t1.algo.head import full_kl, tile_math
from megatron_t1.algo.head.gemm import accumulation_dtype
from megatron_t1.algo.head.layout import AnchorHead, Head, Logits, WeightGradient, add_gradients, hand_back, select
from megatron_t1.algo.head.tile_math import Tile, TileMath
from megatron_t1.algo.loss import Metrics

TokenLoss = Callable[..., tuple[Tensor, Metrics]]
"""(logprob [n], entropy [n], tokens[a:b]) -> (loss [n], metrics); with an anchor also kl [n], last"""

TILE_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Logits alive at a time in the 1 G path: on CPUs what stays in the last-level cache."""

_RowsAndTiles = tuple[slice, list[Tile]]
"""some of this rank's rows, and their logits: the policy's, then the anchor's"""


@torch.no_grad()
def logprob_entropy_nograd(
    hidden: Tensor, head: Head, positions: Tensor, targets: Tensor, anchor: AnchorHead | None = None
) -> tuple[Tensor, ...]:
    """Logprob of each target and full-vocabulary entropy at head.temperature; nothing is kept for a gradient.

    Args:
        hidden: [s, H], or [s / tp, H] under sequence parallelism.
        positions: int64 [T], distinct places in the full stream of s whose output predicts `targets`; all others never
            reach the head. Equal on every rank of the tensor-parallel group.
        targets: int64 [T], global vocabulary entries; one outside the vocabulary gives logprob -inf.

    Returns:
        logprob [T], entropy [T] in nats, and KL(policy||anchor) [T] if an anchor is given; float32 (float64 if hidden
        is).
    """
    kernels = _kernels(hidden.device, anchor)
    models = _models(select(hidden, head, positions), head, positions, targets, anchor)
    return kernels.token_values(_statistics(kernels, models, _tiles(models, TILE_LOGITS[hidden.device.type])))


def fused_loss(
    hidden: Tensor,
    head: Head,
    positions: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    tokens: Any,
    *,
    grad_scale: float = 1.0,
    anchor: AnchorHead | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum over tokens of a pointwise loss, whose gradients are formed in this forward.

    Args:
        hidden, positions, targets: as in `logprob_entropy_nograd`.
        token_loss: loss of each token from its logprob, entropy, its own constants, and with an anchor its KL; it is
            called once for every chunk of tokens and must not mix tokens.
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
        logprob, entropy, *kl = logprob_entropy_nograd(hidden, head, positions, targets, anchor)
        loss, metrics = token_loss(logprob, entropy, tokens[:], *kl)
        return loss.sum(), metrics
    parts: list[Metrics] = []
    total = _FusedLoss.apply(
        hidden, head.weight, head, positions, targets, anchor, token_loss, tokens, grad_scale, parts
    )
    return total, Metrics.merge(parts)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, positions, targets, anchor, token_loss, tokens, grad_scale, parts):
        kernels, x = _kernels(hidden.device, anchor), select(hidden, head, positions)
        dtype = accumulation_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype)
        dw = WeightGradient(head, dtype, grad_scale) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=dtype, device=x.device)
        models = _models(x, head, positions, targets, anchor)
        chunks = _chunks(len(x), head, len(models))
        memory = [model[chunks[0]].memory(head.num_rows) for model in models]
        for chunk in chunks:
            part = [model[chunk] for model in models]
            kept: list[_RowsAndTiles] = []
            stats = _statistics(kernels, part, _tiles(part, TILE_LOGITS[x.device.type] // 2, memory), kept)
            values = [t.requires_grad_() for t in kernels.token_values(stats)]
            with torch.enable_grad():
                logprob, entropy, *kl = values
                loss, metrics = token_loss(logprob, entropy, tokens[chunk], *kl)
                loss_sum = loss.sum()
            grads = torch.autograd.grad(loss_sum, values, allow_unused=True, materialize_grads=True)
            grads = tuple(g / head.temperature for g in grads)
            total += loss_sum.detach()
            parts.append(metrics)
            while kept:  # the last logits made are still in the cache
                rows, tiles = kept.pop()
                add_gradients(
                    kernels.logits_to_gradient(stats, grads, tiles, x.dtype), x[chunk], head, rows, dx[chunk], dw
                )
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
            *(None,) * 8,
        )


def _kernels(device: torch.device, anchor: AnchorHead | None) -> TileMath:
    if device.type == "cuda":
        from megatron_t1.algo.head import triton_full_kl, triton_math

        return triton_full_kl if anchor else triton_math
    return full_kl if anchor else tile_math


def _models(x: Tensor, head: Head, positions: Tensor, targets: Tensor, anchor: AnchorHead | None) -> list[Logits]:
    """The policy's logits and, for a full KL, the anchor's."""
    models = [Logits.of(head, x, targets)]
    if anchor is not None:
        anchor.check(head)
        models.append(Logits.of(anchor.head, select(anchor.hidden, anchor.head, positions), targets))
    return models


def _chunks(num_tokens: int, head: Head, num_models: int) -> list[slice]:
    """Equal chunks of tokens whose logits over this rank's rows fit CHUNK_LOGITS; without tokens one empty chunk."""
    # Every rank of the group must cut alike, also one with nothing but padding: hence shape[0], not num_rows.
    most = max(CHUNK_LOGITS[head.weight.device.type] // (head.weight.shape[0] * num_models), 1)
    num_chunks = max(-(-num_tokens // most), 1)
    step = max(-(-num_tokens // num_chunks), 1)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, max(num_tokens, 1), step)]


def _tiles(models: list[Logits], max_logits: int, memory: list[Tensor] | None = None) -> Iterator[_RowsAndTiles]:
    """Tile after tile of every model, over the last one in memory or, if `memory` for all rows is given, beside it."""
    policy = models[0]
    slices = policy.head.slices(policy.num_tokens, max_logits)
    reused = [m.memory(max((s.stop - s.start for s in slices), default=0)) for m in models] if memory is None else []
    for rows in slices:
        targets = reused if memory is None else [m[policy.num_tokens * rows.start :] for m in memory]
        yield rows, [model.tile(rows, target) for model, target in zip(models, targets, strict=True)]


def _statistics(
    kernels: TileMath, models: list[Logits], tiles: Iterable[_RowsAndTiles], kept: list[_RowsAndTiles] | None = None
) -> Tensor:
    """Over the vocabulary of all ranks; the tiles are put into `kept`."""
    policy = models[0]
    stats = kernels.new_statistics(policy.num_tokens, policy.x)
    for rows, tile in tiles:
        kernels.update_statistics(stats, tile)
        if kept is not None:
            kept.append((rows, tile))
    group = policy.head.tp_group
    if group is not None and group.size() > 1:
        parts = stats.new_empty(group.size(), *stats.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), stats, group=group)
        stats = kernels.merge_statistics(parts)
    return stats
