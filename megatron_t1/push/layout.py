"""Where every tensor lies in the shared bytes, and which trainer rank writes which piece of it: both sides know it.

The trainer computes it once from its plan; the servers are told it once, as JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_t1.weights.plan import Plan

ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor in the shared bytes."""

    name: str
    dtype: str
    """torch's name: `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """First byte, a multiple of ALIGNMENT."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.name}: {self.dtype!r} is no dtype")
        return dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor, aliasing `buffer` (uint8, all tensors)."""
        return buffer[self.offset : self.offset + self.num_bytes].view(self.torch_dtype).view(self.shape)


@dataclass(frozen=True)
class PieceSpec:
    """The part of a tensor that one trainer rank writes, and that is digested as a unit."""

    tensor: TensorSpec
    start: tuple[int, ...]
    stop: tuple[int, ...]
    rank: int
    """The trainer rank that writes it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.index)

    @property
    def index(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) a dimension"""
        return tuple(zip(self.start, self.stop, strict=True))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece, aliasing the whole `tensor`."""
        return tensor[tuple(slice(*bounds) for bounds in self.index)]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The piece, aliasing `buffer`."""
        return self.of(self.tensor.view(buffer))


@dataclass(frozen=True)
class Layout:
    """The shared bytes of a push."""

    tensors: list[TensorSpec]
    pieces: list[PieceSpec]
    """In the order of the plan, and so of its digests."""
    num_bytes: int

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        tensors, pieces, offset = [], [], 0
        for tensor in plan.tensors:
            spec = TensorSpec(tensor.name, str(tensor.dtype).removeprefix("torch."), tensor.shape, offset)
            tensors.append(spec)
            offset = -(-(offset + spec.num_bytes) // ALIGNMENT) * ALIGNMENT
            for part in tensor.parts:
                start, stop = zip(*part.index, strict=True) if part.index else ((), ())
                pieces.append(PieceSpec(spec, tuple(start), tuple(stop), part.rank))
        return cls(tensors, pieces, offset)

    @property
    def owners(self) -> list[int]:
        """The trainer ranks that write any piece, in order; 0 is one of them."""
        return sorted({piece.rank for piece in self.pieces})

    def of_rank(self, rank: int) -> list[PieceSpec]:
        """The pieces that a trainer rank writes, in the plan's order."""
        return [piece for piece in self.pieces if piece.rank == rank]

    def views(self, plan: Plan) -> list[tuple[torch.Tensor, PieceSpec]]:
        """This rank's numbers, each with the piece that they are, in the plan's order."""
        return list(zip((piece.view for piece in plan.mine()), self.of_rank(plan.rank), strict=True))

    def to_json(self) -> dict[str, Any]:
        number = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        return {
            "num_bytes": self.num_bytes,
            "tensors": [[t.name, t.dtype, t.shape, t.offset] for t in self.tensors],
            "pieces": [[number[p.tensor.name], p.start, p.stop, p.rank] for p in self.pieces],
        }

    @classmethod
    def from_json(cls, num_bytes: int, tensors: list[list[Any]], pieces: list[list[Any]]) -> Layout:
        specs = [TensorSpec(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in tensors]
        return cls(
            specs,
            [PieceSpec(specs[i], tuple(start), tuple(stop), rank) for i, start, stop, rank in pieces],
            num_bytes,
        )
