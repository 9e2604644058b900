"""How a Megatron parameter and Hugging Face tensors name the same numbers.

An op is data: which Hugging Face tensors a Megatron parameter is made of, and how tensor parallelism cuts it. Its one
method, `pieces`, lists this rank's part as (Hugging Face name, full shape, index into it, view into the local
parameter). The views alias the parameter, so the same list serves import (write into the views), export and the live
sync (read from them): no direction is written twice.

Names carry `{layer}` and, for the matrices of a mixture of experts, `{expert}`: both are global numbers, so pipeline
and expert parallelism need no op of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Where = Mapping[str, int]
"""What fills a name's fields: `layer` and `expert`, each where it applies."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's part of one Hugging Face tensor.

    `hf[index]` and `view` hold the same numbers in the same order; `view` may have more dimensions (a fused QKV is cut
    by KV group), so copy with `hf[index].view(view.shape)`.
    """

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Full shape of the Hugging Face tensor."""
    index: tuple[slice, ...]
    """Where in it this piece lies, one slice a dimension."""
    view: torch.Tensor
    """The local Megatron numbers, aliased; possibly not contiguous."""

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def num_bytes(self) -> int:
        return self.view.numel() * self.view.element_size()


@dataclass(frozen=True)
class Shard:
    """Which of how many equal cuts (tensor-parallel rank and size) a local parameter is."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Shards:
    """This rank's place in every group that cuts parameters."""

    tensor: Shard = Shard()
    expert: Shard = Shard()
    """Which of the experts are here."""
    expert_tensor: Shard = Shard()
    """How the matrices of one expert are cut."""


@dataclass(frozen=True)
class Rename:
    """One parameter, one tensor, the same layout; cut along `tp_dim`, or replicated when that is None."""

    name: str
    tp_dim: int | None = None

    def pieces(self, param: torch.Tensor, tp: Shard, where: Where) -> list[Piece]:
        shape, index = list(param.shape), [slice(0, n) for n in param.shape]
        if self.tp_dim is not None:
            local = shape[self.tp_dim]
            shape[self.tp_dim] = local * tp.size
            index[self.tp_dim] = slice(tp.rank * local, (tp.rank + 1) * local)
        return [Piece(name=self.name.format(**where), shape=tuple(shape), index=tuple(index), view=param)]


@dataclass(frozen=True, kw_only=True)
class QKV:
    """Megatron's fused QKV: rows ordered by KV group, in each its queries, its key, its value.

    Hugging Face has three projections, or (ChatGLM) one tensor of all queries, then all keys, then all values. Serves
    weights [rows, hidden] and biases [rows]. Where there are more tensor-parallel ranks than KV heads, Megatron cuts
    the rows of one group over several ranks, wherever that falls in it.
    """

    names: tuple[str, ...]
    """Those of q, k and v, or the one of the fused tensor."""
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def pieces(self, param: torch.Tensor, tp: Shard, where: Where) -> list[Piece]:
        widths = (self.num_heads // self.num_kv_heads * self.head_dim, self.head_dim, self.head_dim)
        group_rows, rows = sum(widths), param.shape[0]
        group, low = divmod(tp.rank * rows, group_rows)
        by_group = param.view(-1, min(rows, group_rows), *param.shape[1:])
        pieces, begin = [], 0
        for part, width in enumerate(widths):
            first, last = max(begin - low, 0), min(begin + width - low, by_group.shape[1])
            if first < last:
                start = group * width + low + first - begin
                totals = [w * self.num_kv_heads for w in widths]
                pieces.append(_stacked(self.names, part, totals, start, by_group[:, first:last], param, where))
            begin += width
        return pieces


@dataclass(frozen=True)
class GateUp:
    """Megatron's fused first MLP layer: on every tensor-parallel rank the gate's rows, then the up projection's.

    Hugging Face has two tensors, or (GLM) one of all gate rows, then all up rows.
    """

    names: tuple[str, ...]
    """Those of gate and up, or the one of the fused tensor."""

    def pieces(self, param: torch.Tensor, tp: Shard, where: Where) -> list[Piece]:
        rows = param.shape[0] // 2
        totals = [rows * tp.size] * 2
        return [
            _stacked(self.names, part, totals, tp.rank * rows, view, param, where)
            for part, view in enumerate(param.chunk(2))
        ]


@dataclass(frozen=True)
class Vocab:
    """Embedding rows, cut by vocabulary; Megatron pads them to a multiple of TP, Hugging Face does not.

    Padded rows belong to no piece: they are neither imported nor exported, and the loss masks them.
    """

    name: str
    vocab_size: int

    def pieces(self, param: torch.Tensor, tp: Shard, where: Where) -> list[Piece]:
        start = tp.rank * param.shape[0]
        rows = max(0, min(param.shape[0], self.vocab_size - start))
        if rows == 0:
            return []
        hidden = param.shape[1]
        index = (slice(start, start + rows), slice(0, hidden))
        return [Piece(name=self.name, shape=(self.vocab_size, hidden), index=index, view=param[:rows])]


Op = Rename | QKV | GateUp | Vocab


def _stacked(
    names: tuple[str, ...],
    part: int,
    totals: list[int],
    start: int,
    view: torch.Tensor,
    param: torch.Tensor,
    where: Where,
) -> Piece:
    """The piece of one part, whose rows are a tensor of their own or, when there is one name, follow the parts before.

    Args:
        totals: rows of each part over all ranks.
        start: where in its part `view` begins.
        param: the parameter that `view` looks into: its dimensions past the rows are those of the tensor.
    """
    rest = param.shape[1:]
    name, total = (names[part], totals[part]) if len(names) > 1 else (names[0], sum(totals))
    if len(names) == 1:
        start += sum(totals[:part])
    rows = view.numel() // math.prod(rest)
    index = (slice(start, start + rows), *(slice(0, n) for n in rest))
    return Piece(name=name.format(**where), shape=(total, *rest), index=index, view=view)
