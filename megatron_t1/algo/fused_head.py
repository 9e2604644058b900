"""Output layer, temperature, logprob and entropy in one: from hidden states to per-token losses, never [tokens,
vocabulary].

Logits live one tile at a time (some vocabulary rows x some tokens). Three ways through, G = one GEMM [T,H]x[H,V]:

- `logprob_entropy_nograd`  1 G: statistics only (anchor logprobs, evaluation).
- `logprob_entropy`         4 G: differentiable; the backward recomputes each tile.
- `fused_loss`              3 G: a pointwise loss lets each chunk of tokens form its gradients in the forward, while its
                            logits are still there.

Vocabulary-parallel: every rank of `tp_group` holds some rows of the output embedding and the same positions. The
forward gathers 16 bytes a token and merges them in rank order (the same result, bit for bit, on every rank); the
backward sums dX over the ranks; dW is local. Under sequence parallelism the hidden states are gathered first and dX
is reduce-scattered.

Left out: a bias in the output layer, context parallelism, Megatron's deferred embedding gradient
(`defer_embedding_wgrad_compute`). No Megatron import: `main_grad` is found by its attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_t1.algo.head_gemm import accumulation_dtype, add_matmul_, matmul, operand_dtype
from megatron_t1.algo.head_tiles import logits_to_gradient_, merge_statistics, new_statistics, update_statistics
from megatron_t1.algo.loss import Metrics

Tokens = TypeVar("Tokens")
TokenLoss = Callable[[Tensor, Tensor, Any], tuple[Tensor, Metrics]]
"""(logprob [n], entropy [n], tokens[a:b]) -> (loss [n], metrics)"""

TILE_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Logits alive at a time in the 1 G and 4 G paths: on CPUs what stays in the last-level cache."""
CHUNK_LOGITS = {"cpu": 75 * 2**20, "cuda": 320 * 2**20}
"""Logits alive at a time in the 3 G path: a chunk of tokens over all rows of this rank; 300 MiB and 1.25 GiB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """Everything about this rank's output layer that is not the hidden states."""

    weight: Tensor
    """[V_local, H] this rank's rows, padded vocabulary rows included"""
    vocab_start: int = 0
    """global vocabulary entry of this rank's first row"""
    vocab_size: int
    """global vocabulary without padding; rows past it are never computed and get a zero gradient"""
    temperature: float
    tp_group: ProcessGroup | None = None
    sequence_parallel: bool = False
    """hidden states are this rank's [s / tp, H] slice of the sequence"""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive")
        if self.sequence_parallel and self.tp_group is None:
            raise ValueError("sequence_parallel needs tp_group: without one the hidden states are already whole")

    @property
    def num_rows(self) -> int:
        """Rows of `weight` that are vocabulary entries; a rank may hold nothing but padding."""
        return min(max(self.vocab_size - self.vocab_start, 0), self.weight.shape[0])

    def tiles(self, num_tokens: int, max_logits: int) -> list[slice]:
        """Cut the rows so that num_tokens x rows is about max_logits, at least 256 rows (GEMMs get slow below)."""
        step = max(max_logits // max(num_tokens, 1), 256)
        return [slice(start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step)]

    def logits(self, x: Tensor, tile: slice) -> Tensor:
        z = matmul(x, self.weight.detach()[tile].t())
        return z if self.temperature == 1.0 else z.mul_(1.0 / self.temperature)


def logprob_entropy(hidden: Tensor, head: Head, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob of each target and full-vocabulary entropy, at head.temperature, both differentiable in hidden and
    weight.

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
    x = _select(hidden, head, positions)
    return _logprob_and_entropy(_statistics(x, head, targets, TILE_LOGITS[x.device.type]))


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
        chunk
            of tokens and must not mix tokens.
        tokens: the constants; `tokens[a:b]` is handed to token_loss.
        grad_scale: the gradient that the backward will bring to the returned sum (loss scale, 1 / num_microbatches, 1 /
            normaliser ...). Only needed where the weight has Megatron's `main_grad`: dW is added to it in this forward,
            already multiplied, so it must be known here.

    Returns:
        The sum (a scalar with gradient) and the metrics merged over chunks. Under torch.no_grad: no gradient, 1 G.

    Raises:
        RuntimeError: in the backward, when dW went into main_grad and the gradient that came is not `grad_scale`.

    The forward must be followed by exactly one backward: one that is run twice (activation recomputation around
    it) would add dW twice.
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
        x = _select(hidden, head, positions)
        stats = _statistics(x, head, targets, TILE_LOGITS[x.device.type])
        ctx.save_for_backward(x, stats, positions, targets)
        ctx.head, ctx.hidden_shape, ctx.dtype = head, hidden.shape, hidden.dtype
        return _logprob_and_entropy(stats)

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        x, stats, positions, targets = ctx.saved_tensors
        head = ctx.head
        g_logprob, g_entropy = g_logprob / head.temperature, g_entropy / head.temperature
        dx = torch.zeros_like(x, dtype=stats.dtype)
        dw = _WeightGradient(head, head.weight.dtype) if ctx.needs_input_grad[1] else None
        tiles = head.tiles(len(x), TILE_LOGITS[x.device.type])
        scratch = _scratch(tiles, stats)
        for tile in tiles:
            z, column = head.logits(x, tile), head.vocab_start + tile.start
            dz = logits_to_gradient_(z, None, stats, column, targets, g_logprob, g_entropy, scratch)
            _add_gradients(dz, x, head, tile, dx, dw)
        return (
            _hand_back(dx, head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd() if dw else None,
            *(None,) * 3,
        )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, positions, targets, token_loss, tokens, grad_scale, parts):
        x = _select(hidden, head, positions)
        dtype = accumulation_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype)
        dw = _WeightGradient(head, dtype, grad_scale) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=dtype, device=x.device)
        for chunk in _chunks(len(x), head):
            part_x, part_dx, part_targets = x[chunk], dx[chunk], targets[chunk]
            logits: list[tuple[slice, Tensor, Tensor]] = []
            stats = _statistics(part_x, head, part_targets, TILE_LOGITS[x.device.type], logits)
            logprob, entropy = (t.requires_grad_() for t in _logprob_and_entropy(stats))
            with torch.enable_grad():
                loss, metrics = token_loss(logprob, entropy, tokens[chunk])
                loss_sum = loss.sum()
            grads = torch.autograd.grad(loss_sum, (logprob, entropy), allow_unused=True, materialize_grads=True)
            g_logprob, g_entropy = (g / head.temperature for g in grads)
            total += loss_sum.detach()
            parts.append(metrics)
            scratch = _scratch([tile for tile, _, _ in logits], stats)
            while logits:  # the last ones made are still in the cache
                tile, z, shift = logits.pop()
                column = head.vocab_start + tile.start
                dz = logits_to_gradient_(z, shift, stats, column, part_targets, g_logprob, g_entropy, scratch)
                _add_gradients(dz, part_x, head, tile, part_dx, dw)
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
            _hand_back(dx * g, ctx.head, positions, ctx.hidden_shape, ctx.dtype) if ctx.needs_input_grad[0] else None,
            dw.for_autograd(g) if dw else None,
            *(None,) * 7,
        )


def _chunks(num_tokens: int, head: Head) -> Iterator[slice]:
    """Equal chunks of tokens whose logits over this rank's rows fit CHUNK_LOGITS; without tokens one empty chunk."""
    # Every rank of the group must cut alike, also one with nothing but padding: hence shape[0], not num_rows.
    most = max(CHUNK_LOGITS[head.weight.device.type] // head.weight.shape[0], 1)
    step = max(-(-num_tokens // -(-num_tokens // most)), 1) if num_tokens else 1
    for start in range(0, max(num_tokens, 1), step):
        yield slice(start, min(start + step, num_tokens))


def _statistics(
    x: Tensor, head: Head, targets: Tensor, max_logits: int, keep: list[tuple[slice, Tensor, Tensor]] | None = None
) -> Tensor:
    """[4, T] over the vocabulary of all ranks. `keep` receives every tile with its logits - shift, and shift."""
    stats = new_statistics(len(x), x)
    tiles = head.tiles(len(x), max_logits)
    scratch = _scratch(tiles, stats)
    for tile in tiles:
        z = head.logits(x, tile)
        shift = update_statistics(stats, z, head.vocab_start + tile.start, targets, scratch)
        if keep is not None:
            keep.append((tile, z, shift))
    if head.tp_group is None or head.tp_group.size() == 1:
        return stats
    parts = stats.new_empty(head.tp_group.size(), *stats.shape)
    dist.all_gather_into_tensor(parts.view(-1, stats.shape[1]), stats, group=head.tp_group)
    return merge_statistics(parts)


def _scratch(tiles: list[slice], stats: Tensor) -> Tensor:
    """Room for one tile of logits."""
    return stats.new_empty(stats.shape[1] * max((tile.stop - tile.start for tile in tiles), default=0))


def _logprob_and_entropy(stats: Tensor) -> tuple[Tensor, Tensor]:
    m, s, a, z_y = stats
    log_s = s.log()
    return (z_y - m) - log_s, log_s - a / s


def _add_gradients(dz: Tensor, x: Tensor, head: Head, tile: slice, dx: Tensor, dw: _WeightGradient | None) -> None:
    dz = dz.to(x.dtype)
    add_matmul_(dx, dz, head.weight.detach()[tile])
    if dw:
        dw.add(tile, dz, x)


class _WeightGradient:
    """Where dW goes: Megatron's main gradient when the weight has one, else a buffer of our own for autograd."""

    def __init__(self, head: Head, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.weight, self.scale = head.weight, scale
        self.main_grad: Tensor | None = getattr(head.weight, "main_grad", None)
        self.buffer = torch.empty_like(head.weight, dtype=dtype) if self.main_grad is None else self.main_grad
        self.fresh = self.main_grad is None  # rows are written, not added to, by the first chunk of tokens
        if self.fresh:
            self.buffer[head.num_rows :] = 0

    def add(self, tile: slice, dz: Tensor, x: Tensor) -> None:
        alpha = 1.0 if self.main_grad is None else self.scale
        add_matmul_(self.buffer[tile], dz.t(), x, alpha=alpha, overwrite=self.fresh)

    def for_autograd(self, g: Tensor | None = None) -> Tensor | None:
        """What the backward returns for the weight; `g` is the gradient that came to a loss formed in the forward."""
        if self.main_grad is None:
            return self.buffer if g is None else self.buffer.mul_(g)
        if g is not None and abs(g.item() - self.scale) > 1e-6 * abs(self.scale):
            raise RuntimeError(
                f"fused_loss added dW to main_grad for an incoming gradient of {self.scale} but got {g.item()}: pass"
                " grad_scale = everything the loss is multiplied by between fused_loss and the backward"
            )
        # As in Megatron's own fused linear (tensor_parallel/layers.py): DDP's hook must see a gradient but not add it,
        # except on an embedding tied within this stage (zero_out_wgrad), whose hook adds what autograd summed.
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return self.weight.new_zeros(()).expand_as(self.weight)
        return self.weight.detach()  # never read; an alias costs no memory


def _select(hidden: Tensor, head: Head, positions: Tensor) -> Tensor:
    """[T, H]: the hidden states that predict a target, of the whole stream."""
    hidden = hidden.detach()
    if head.sequence_parallel and head.tp_group is not None:
        whole = hidden.new_empty(hidden.shape[0] * head.tp_group.size(), hidden.shape[1])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=head.tp_group)
        hidden = whole
    return hidden[positions].to(operand_dtype(hidden.device, hidden.dtype))


def _hand_back(dx: Tensor, head: Head, positions: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """This rank's partial dX [T, H] -> the gradient of `hidden`, summed over ranks in the accumulation dtype."""
    group = head.tp_group
    if group is None:
        return dx.new_zeros(shape, dtype=dtype).index_copy_(0, positions, dx.to(dtype))
    if not head.sequence_parallel:
        dx = dx.contiguous()
        dist.all_reduce(dx, group=group)
        return dx.new_zeros(shape, dtype=dtype).index_copy_(0, positions, dx.to(dtype))
    whole = dx.new_zeros(shape[0] * group.size(), shape[1]).index_copy_(0, positions, dx)
    mine = dx.new_empty(shape)
    dist.reduce_scatter_tensor(mine, whole, group=group)
    return mine.to(dtype)
