"""How a Megatron parameter and Hugging Face tensors name the same numbers.

An op is data: which Hugging Face tensors a Megatron parameter is made of, and how tensor parallelism cuts it. Its one
method, `pieces`, lists this rank's part as (Hugging Face name, full shape, index into it, view into the local
parameter). The views alias the parameter, so the same list serves import (write into the views), export and the live
sync (read from them): no direction is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


@dataclass(frozen=True)
class Rename:
    """One parameter, one tensor, the same layout; cut along `tp_dim`, or replicated when that is None."""

    name: str
    tp_dim: int | None = None

    def pieces(self, param: torch.Tensor, tp: Shard, layer: int) -> list[Piece]:
        shape, index = list(param.shape), [slice(0, n) for n in param.shape]
        if self.tp_dim is not None:
            local = shape[self.tp_dim]
            shape[self.tp_dim] = local * tp.size
            index[self.tp_dim] = slice(tp.rank * local, (tp.rank + 1) * local)
        return [Piece(name=self.name.format(layer=layer), shape=tuple(shape), index=tuple(index), view=param)]


@dataclass(frozen=True, kw_only=True)
class QKV:
    """Megatron's fused QKV (rows ordered by KV group: its queries, its key, its value) and three projections.

    Serves weights [rows, hidden] and biases [rows].
    """

    q: str
    k: str
    v: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def pieces(self, param: torch.Tensor, tp: Shard, layer: int) -> list[Piece]:
        num_groups = self.num_kv_heads // tp.size
        queries = self.num_heads // self.num_kv_heads
        rest = param.shape[1:]
        by_group = param.view(num_groups, queries + 2, self.head_dim, *rest)
        parts = ((self.q, by_group[:, :queries]), (self.k, by_group[:, queries]), (self.v, by_group[:, queries + 1]))
        pieces = []
        for name, view in parts:
            rows = view.numel() // max(1, rest.numel())
            index = (slice(tp.rank * rows, (tp.rank + 1) * rows), *(slice(0, n) for n in rest))
            shape = (rows * tp.size, *rest)
            pieces.append(Piece(name=name.format(layer=layer), shape=shape, index=index, view=view))
        return pieces


@dataclass(frozen=True)
class GateUp:
    """Megatron's fused first MLP layer: on every tensor-parallel rank the gate's rows, then the up projection's."""

    gate: str
    up: str

    def pieces(self, param: torch.Tensor, tp: Shard, layer: int) -> list[Piece]:
        pieces = []
        for name, view in zip((self.gate, self.up), param.chunk(2), strict=True):
            rows, rest = view.shape[0], view.shape[1:]
            index = (slice(tp.rank * rows, (tp.rank + 1) * rows), *(slice(0, n) for n in rest))
            pieces.append(Piece(name=name.format(layer=layer), shape=(rows * tp.size, *rest), index=index, view=view))
        return pieces


@dataclass(frozen=True)
class Vocab:
    """Embedding rows, cut by vocabulary; Megatron pads them to a multiple of TP, Hugging Face does not.

    Padded rows belong to no piece: they are neither imported nor exported, and the loss masks them.
    """

    name: str
    vocab_size: int

    def pieces(self, param: torch.Tensor, tp: Shard, layer: int) -> list[Piece]:
        start = tp.rank * param.shape[0]
        rows = max(0, min(param.shape[0], self.vocab_size - start))
        if rows == 0:
            return []
        hidden = param.shape[1]
        index = (slice(start, start + rows), slice(0, hidden))
        return [Piece(name=self.name, shape=(self.vocab_size, hidden), index=index, view=param[:rows])]


Op = Rename | QKV | GateUp | Vocab
