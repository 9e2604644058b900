"""This rank's output layer, and where its inputs come from and its gradients go under Megatron's parallel layouts.

Vocabulary-parallel: every rank of `tp_group` holds some rows of the output embedding and is given the same
positions. The backward sums dX over the ranks; dW is local. Under sequence parallelism the hidden states are
gathered first and dX is reduce-scattered.

Under context parallelism each rank has positions of its own, and nothing else is different here.

Left out: a bias in the output layer, Megatron's deferred embedding gradient
(`defer_embedding_wgrad_compute`). No Megatron import: `main_grad` is found by its attribute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_t1.algo.head.gemm import (
    accumulation_dtype,
    add_matmul_,
    gradient_operand_dtype,
    logits_operand_dtype,
    matmul,
)
from megatron_t1.algo.head.tile_math import Tile


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

    def slices(self, num_tokens: int, max_logits: int) -> list[slice]:
        """Cut the rows by multiples of 256 so that num_tokens x rows is about max_logits.

        With fewer rows GEMMs get slow; with an odd number of them rows of logits are not aligned, and cuBLAS takes
        kernels without tensor memory access: the whole head was 3.3 times as slow on an H200.
        """
        step = max(max_logits // max(num_tokens, 1) // 256, 1) * 256
        return [slice(start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step)]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnchorHead:
    """The anchor's last hidden states of the same stream and its output layer, constants of a full-vocabulary KL."""

    hidden: Tensor
    """as the policy's: [s, H], or [s / tp, H] under sequence parallelism"""
    head: Head

    def check(self, policy: Head) -> None:
        """Raise ValueError when the two models are not cut alike."""
        if policy.num_rows != self.head.num_rows or policy.vocab_start != self.head.vocab_start:
            raise ValueError(
                f"policy rows [{policy.vocab_start}, +{policy.num_rows}) and anchor rows [{self.head.vocab_start},"
                f" +{self.head.num_rows}) differ; give both models the same tensor-parallel layout"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Logits:
    """The logits of T tokens over this rank's rows, a tile at a time."""

    head: Head
    x: Tensor
    """[T, H]"""
    scale: float
    """logits = scale * x.w"""
    targets: Tensor
    """int64 [T]"""

    @classmethod
    def of(cls, head: Head, x: Tensor, targets: Tensor) -> Logits:
        """x [T, H] as `select` gives it; the temperature is applied here."""
        x = x.to(logits_operand_dtype(x.device, x.dtype))
        if x.dtype.itemsize < 4:  # a narrow x must not be rounded again
            return cls(head=head, x=x, scale=1.0 / head.temperature, targets=targets)
        return cls(head=head, x=x if head.temperature == 1.0 else x / head.temperature, scale=1.0, targets=targets)

    def __getitem__(self, tokens: slice) -> Logits:
        return replace(self, x=self.x[tokens], targets=self.targets[tokens])

    @property
    def num_tokens(self) -> int:
        return len(self.x)

    def memory(self, num_rows: int) -> Tensor:
        """Flat memory for the logits of so many rows. Allocating each tile anew would cost page faults on CPUs."""
        return self.x.new_empty(len(self.x) * num_rows, dtype=accumulation_dtype(self.x.dtype))

    def tile(self, rows: slice, memory: Tensor) -> Tile:
        """Made at the beginning of `memory`."""
        shape = len(self.x), rows.stop - rows.start
        z = matmul(self.x, self.head.weight.detach()[rows].t(), memory[: shape[0] * shape[1]].view(shape))
        return Tile(z=z, scale=self.scale, column=self.head.vocab_start + rows.start, targets=self.targets)


def select(hidden: Tensor, head: Head, positions: Tensor) -> Tensor:
    """[T, H]: the hidden states that predict a target, of the whole stream, as the gradients' GEMMs want them."""
    hidden = hidden.detach()
    if head.sequence_parallel and head.tp_group is not None:
        whole = hidden.new_empty(hidden.shape[0] * head.tp_group.size(), hidden.shape[1])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=head.tp_group)
        hidden = whole
    return hidden[positions].to(gradient_operand_dtype(hidden.device, hidden.dtype))


def hand_back(dx: Tensor, head: Head, positions: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """This rank's partial dX [T, H] -> the gradient of `hidden`, summed over ranks before it is rounded to `dtype`."""
    group = head.tp_group
    if group is not None and head.sequence_parallel:
        whole = dx.new_zeros(shape[0] * group.size(), shape[1]).index_copy_(0, positions, dx)
        mine = dx.new_empty(shape)
        dist.reduce_scatter_tensor(mine, whole, group=group)
        return mine.to(dtype)
    if group is not None:
        dist.all_reduce(dx, group=group)
    return dx.new_zeros(shape, dtype=dtype).index_copy_(0, positions, dx.to(dtype))


class WeightGradient:
    """Where dW goes: Megatron's main gradient when the weight has one, else a buffer of our own for autograd."""

    def __init__(self, head: Head, dtype: torch.dtype, scale: float) -> None:
        self.weight, self.scale = head.weight, scale
        self.main_grad: Tensor | None = getattr(head.weight, "main_grad", None)
        self.buffer = torch.empty_like(head.weight, dtype=dtype) if self.main_grad is None else self.main_grad
        self.fresh = self.main_grad is None  # rows are written, not added to, by the first chunk of tokens
        if self.fresh:
            self.buffer[head.num_rows :] = 0

    def add(self, rows: slice, dz: Tensor, x: Tensor) -> None:
        alpha = 1.0 if self.main_grad is None else self.scale
        add_matmul_(self.buffer[rows], dz.t(), x, alpha=alpha, overwrite=self.fresh)

    def for_autograd(self, g: Tensor) -> Tensor | None:
        """What the backward returns for the weight; `g` is the gradient that came to a loss formed in the forward."""
        if self.main_grad is None:
            return self.buffer.mul_(g)
        # On a GPU without waiting for it: there a false condition ends the process.
        torch._assert_async(
            (g - self.scale).abs() <= 1e-6 * abs(self.scale),
            f"fused_loss added dW to main_grad for an incoming gradient of {self.scale} and got another: pass "
            "grad_scale = everything the loss is multiplied by between fused_loss and the backward",
        )
        # As in Megatron's own fused linear (tensor_parallel/layers.py): DDP's hook must see a gradient but not add it,
        # except on an embedding tied within this stage (zero_out_wgrad), whose hook adds what autograd summed.
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight, "zero_out_wgrad", False):
            return self.weight.new_zeros(()).expand_as(self.weight)
        return self.weight.detach()  # never read; an alias costs no memory


def add_gradients(dz: Tensor, x: Tensor, head: Head, rows: slice, dx: Tensor, dw: WeightGradient | None) -> None:
    """One tile's share of dX and dW."""
    add_matmul_(dx, dz, head.weight.detach()[rows])
    if dw:
        dw.add(rows, dz, x)
