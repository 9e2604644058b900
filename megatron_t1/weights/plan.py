"""The trainer's weights as Hugging Face tensors: which parts this rank has, and who owns what.

`local_pieces` lists this rank's parts without copying; `Plan` agrees over all ranks which rank provides which part of
which tensor, and refuses a plan that does not cover every element exactly once. Export, checkpoint conversion and the
live sync all start from these two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_t1.models.spec import ModelSpec
from megatron_t1.models.weight_map import Piece, Shards
from megatron_t1.weights.sums import fingerprint, word_sum

# Transformer Engine keeps a norm's weight in the linear layer that follows it.
_TE_ALIAS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.*)$")
# One expert's matrix: in Megatron's SequentialMLP, or in Transformer Engine's grouped linear.
_EXPERT = re.compile(r"^(.*mlp\.experts\.)(?:local_experts\.(\d+)\.(linear_fc\d\.weight)|(linear_fc\d\.weight)(\d+))$")

Named = Iterable[tuple[str, torch.Tensor]]


def weights_of(chunk: torch.nn.Module) -> Named:
    """A chunk's parameters, and the buffers that are weights (a router's bias): those that its state dict has."""
    yield from ((name, param.data) for name, param in chunk.named_parameters())
    kept = chunk.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name in kept)


def local_pieces(
    chunks: Iterable[torch.nn.Module],
    spec: ModelSpec,
    shards: Shards,
    tensors_of: Callable[[Any], Named] = weights_of,
) -> list[Piece]:
    """This rank's pieces of every Hugging Face tensor, as views into the weights of its (unwrapped) model chunks.

    Args:
        tensors_of: what to view of a chunk; its gradients, for example.

    Raises:
        ValueError: a weight that the family's map does not name.
    """
    pieces: list[Piece] = []
    for chunk in chunks:
        decoder: Any = chunk.decoder
        for full_name, tensor in tensors_of(chunk):
            name, where, shard = full_name, {}, shards.tensor
            if match := _LAYER.match(full_name):
                where["layer"] = decoder.layers[int(match[2])].layer_number - 1
                name = f"{match[1]}{{layer}}.{_TE_ALIAS.get(match[3], match[3])}"
            if match := _EXPERT.match(name):
                num_local = spec.transformer["num_moe_experts"] // shards.expert.size
                where["expert"] = shards.expert.rank * num_local + int(match[2] or match[5])
                name = f"{match[1]}{{expert}}.{match[3] or match[4]}"
                shard = shards.expert_tensor
            if name not in spec.weights:
                raise ValueError(f"the weight map of {spec.architecture} has no entry for the parameter {full_name}")
            pieces += spec.weights[name].pieces(tensor, shard, where)
    return pieces


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece without its numbers: what ranks tell each other."""

    rank: int
    index: tuple[tuple[int, int], ...]
    """(start, stop) a dimension"""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """Disjoint, covering the tensor; each with the one rank that provides it."""


class Plan:
    """Every Hugging Face tensor of the model and, for each part of it, the one rank that provides it.

    The same on all ranks. Parts that several ranks hold (data-parallel replicas, norms under tensor parallelism, tied
    embeddings on two pipeline stages) are given to the lowest of these ranks.
    """

    def __init__(self, pieces: list[Piece], group: dist.ProcessGroup | None = None) -> None:
        """Collective over `group` (default: the world) when torch.distributed is up.

        Raises:
            ValueError: ranks disagree on a shape or dtype, or a tensor is not covered exactly once.
        """
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        mine = [(p.name, p.shape, p.dtype, tuple((s.start, s.stop) for s in p.index)) for p in pieces]
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, mine, group=group)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        parts: dict[str, dict[tuple[tuple[int, int], ...], int]] = {}
        for rank, listed in enumerate(everyone):
            for name, shape, dtype, index in listed:
                if shapes.setdefault(name, (shape, dtype)) != (shape, dtype):
                    raise ValueError(f"tensor {name}: rank {rank} has {shape} {dtype}, another has {shapes[name]}")
                parts.setdefault(name, {}).setdefault(index, rank)
        self.tensors: list[TensorPlan] = []
        for name, (shape, dtype) in shapes.items():
            _check_coverage(name, shape, list(parts[name]))
            owned = tuple(Part(rank=rank, index=index) for index, rank in parts[name].items())
            self.tensors.append(TensorPlan(name=name, shape=shape, dtype=dtype, parts=owned))
        local = {(p.name, tuple((s.start, s.stop) for s in p.index)): p for p in pieces}
        self._mine = {
            (tensor.name, part.index): local[tensor.name, part.index]
            for tensor in self.tensors
            for part in tensor.parts
            if part.rank == self.rank
        }
        self._group = group

    def mine(self) -> list[Piece]:
        """The pieces that this rank provides, in the plan's order."""
        return list(self._mine.values())

    def fingerprint(self) -> str:
        """Collective: a digest of every number in the pieces, the same on all ranks and for every layout."""
        mine = [(name, word_sum(piece.view, index)) for (name, index), piece in self._mine.items()]
        everyone = [mine]
        if dist.is_initialized():
            everyone *= dist.get_world_size(self._group)
            dist.all_gather_object(everyone, mine, group=self._group)
        return fingerprint(chain.from_iterable(everyone))

    def gather(self, dst: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: rank `dst` gets (name, whole tensor on the CPU) one after the other, the others get nothing.

        At most one tensor is in flight, so the extra memory is that of the largest.
        """
        for tensor in self.tensors:
            if self.rank != dst:
                for part in tensor.parts:
                    if part.rank == self.rank:
                        dist.send(self._mine[tensor.name, part.index].view.contiguous().cpu(), dst, group=self._group)
                continue
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            for part in tensor.parts:
                target = whole[tuple(slice(*bounds) for bounds in part.index)]
                if part.rank == dst:
                    view = self._mine[tensor.name, part.index].view
                    target.view(view.shape).copy_(view) if target.is_contiguous() else target.copy_(view)
                else:
                    received = torch.empty(target.shape, dtype=tensor.dtype)
                    dist.recv(received, part.rank, group=self._group)
                    target.copy_(received)
            yield tensor.name, whole


def _check_coverage(name: str, shape: tuple[int, ...], indices: list[tuple[tuple[int, int], ...]]) -> None:
    """Every element exactly once: parts within bounds, pairwise disjoint, and of the tensor's size together."""
    for index in indices:
        if any(not 0 <= start < stop <= size for (start, stop), size in zip(index, shape, strict=True)):
            raise ValueError(f"tensor {name}: part {index} lies outside of its shape {shape}")
    covered = sum(math.prod(stop - start for start, stop in index) for index in indices)
    overlap = any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
        for i, one in enumerate(indices)
        for other in indices[:i]
    )
    if overlap or covered != math.prod(shape):
        raise ValueError(f"tensor {name} of shape {shape} is not covered exactly once by its parts {indices}")
