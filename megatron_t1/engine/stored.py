"""Where a model's parameters lie in a Megatron checkpoint, and the Hugging Face tensors that they are made of.

The keys, the stacking of layers and experts and the halves of a gated layer are Megatron's own: they are read off a
model's sharded state dict. Off a model on the `meta` device, which has shapes and no memory, for conversion; off the
trainer's own, at whatever layout, to start from a checkpoint. Left out: Transformer Engine's extra state (FP8 scales),
which is found anew in the first steps.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_t1.engine.config import ModelConfig, ParallelConfig
from megatron_t1.engine.model import T1GPTModel, build_model
from megatron_t1.engine.parallel import initialize, shards
from megatron_t1.models import spec_of
from megatron_t1.models.spec import ModelSpec
from megatron_t1.models.weight_map import Piece
from megatron_t1.platform.detect import setup
from megatron_t1.weights.buffers import TwoBuffers
from megatron_t1.weights.hf_folder import CheckpointError, TensorInfo
from megatron_t1.weights.hf_io import CARRIED, Carried
from megatron_t1.weights.plan import Named, local_pieces, weights_of
from megatron_t1.weights.torch_dist import Box, TorchDistReader

_ROWS_AT_ONCE = 4096
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredPart:
    """One box of a checkpoint, and the numbers that belong there."""

    box: Box
    full_shape: tuple[int, ...]
    """Of the checkpoint's tensor that the box is cut from."""
    data: torch.Tensor
    """A view into the parameter; the box without its stacking dimensions."""
    may_differ: bool
    """Another layout pads the vocabulary to another size: rows past the stored ones are padding."""


@dataclass(frozen=True)
class StoredParam:
    """One parameter (or a buffer that is a weight)."""

    name: str
    """In the model's state dict, layers numbered on this rank."""
    tensor: torch.Tensor
    """The parameter itself; on the `meta` device, its shape."""
    sharded: ShardedTensor | ShardedTensorFactory
    pieces: tuple[Piece, ...]
    """Its Hugging Face tensors, as views into `tensor`."""

    @property
    def keys(self) -> set[str]:
        return {part.box.key for part in self.parts(self.tensor)}

    @property
    def layer(self) -> int | None:
        """Counted on this rank."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None

    @property
    def cut_dim(self) -> int:
        """The dimension that tensor parallelism cuts; the first one where it cuts none."""
        return max(0, getattr(self.tensor, "partition_dim", 0))

    def parts(self, tensor: torch.Tensor) -> list[StoredPart]:
        """Of a tensor in the parameter's place, and of its shape."""
        if isinstance(self.sharded, ShardedTensorFactory):
            factory = copy.copy(self.sharded)
            factory.data = tensor
            found = list(nested_values(factory.build()))
        else:
            found = [replace(self.sharded, data=tensor, dtype=tensor.dtype)]
        return [
            StoredPart(
                Box(s.key, tuple(s.global_offset), (1,) * s.prepend_axis_num + tuple(s.local_shape)),
                tuple(s.global_shape),
                s.data,
                s.allow_shape_mismatch,
            )
            for s in found
        ]

    def views(self, tensor: torch.Tensor) -> list[Piece]:
        """The pieces, as views into a contiguous tensor in the parameter's place."""
        start = self.tensor.storage_offset()
        return [
            replace(p, view=tensor.as_strided(p.view.shape, p.view.stride(), p.view.storage_offset() - start))
            for p in self.pieces
        ]

    def read(self, reader: TorchDistReader, into: torch.Tensor) -> None:
        """Fill a tensor in the parameter's place, in any precision; rows that pad the vocabulary become 0."""
        for part in self.parts(into):
            target, box = part.data, part.box
            if part.may_differ:
                rows = max(0, min(box.shape[0], reader.shape(box.key)[0] - box.offset[0]))
                target[rows:].zero_()
                target, box = target[:rows], replace(box, shape=(rows, *box.shape[1:]))
            if target.numel():
                reader.read(box, target.view(box.shape))


def stored_params(module: T1GPTModel, spec: ModelSpec) -> list[StoredParam]:
    """Every weight of one of this rank's chunks of the model, in its order."""
    sharded = {
        _place(entry.data): entry
        for entry in nested_values(module.sharded_state_dict())
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None
    }
    params = []
    for name, tensor in weights_of(module):
        if (entry := sharded.get(_place(tensor))) is None:
            raise CheckpointError(f"Megatron does not store {name}")
        pieces = local_pieces([module], spec, shards(), partial(_only, name, tensor))
        params.append(StoredParam(name, entry.data, entry, tuple(pieces)))
    return params


def _only(name: str, tensor: torch.Tensor, _: object) -> Named:
    return [(name, tensor)]


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its numbers are. The distributed optimizer keeps all parameters in one storage."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def check_keys(params: list[StoredParam], reader: TorchDistReader) -> None:
    """The checkpoint has the tensors of these parameters and no other. Collective: parameters of all ranks count.

    Raises:
        CheckpointError: a tensor that is missing, misshapen or not used, by name.
    """
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {}
    for param in params:
        for part in param.parts(param.tensor):
            shape = (param.pieces[0].shape[0], *part.full_shape[1:]) if part.may_differ else part.full_shape
            wanted[part.box.key] = shape, part.may_differ
    if dist.is_initialized():
        everyone: list[dict[str, tuple[tuple[int, ...], bool]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, wanted)
        wanted = {key: asked for one in everyone for key, asked in one.items()}
    if missing := sorted(wanted.keys() - reader.keys()):
        raise CheckpointError(f"{reader.folder} lacks {len(missing)} tensors, the first: {missing[:5]}")
    for key, (shape, may_have_more) in wanted.items():
        found = reader.shape(key)
        if found != shape and not (may_have_more and found[0] >= shape[0] and found[1:] == shape[1:]):
            raise CheckpointError(f"{reader.folder}: {key} has shape {found}, the config asks for {shape}")
        if may_have_more and (row := _learned_row(reader, key, shape[0])) is not None:
            raise CheckpointError(
                f"{reader.folder}: {key} has {found[0]} rows and row {row} is learned, vocab_size = {shape[0]} in "
                f"config.json would drop it: set vocab_size to {found[0]}"
            )
    if extra := sorted(reader.keys() - wanted.keys()):
        raise CheckpointError(
            f"{reader.folder} has {len(extra)} tensors that the model does not use, the first: {extra[:5]}"
        )


def _learned_row(reader: TorchDistReader, key: str, vocab_size: int) -> int | None:
    """The first row past the vocabulary that is no padding: not 0, and more of them than Megatron pads.

    Our own padding is 0. Megatron's may hold numbers: it makes the rows a multiple of the ranks that cut them, by
    default of 128 times as many.
    """
    rows, width = reader.shape(key)
    ranks = reader.num_cuts(key)
    if any(rows % multiple == 0 and rows - vocab_size < multiple for multiple in (ranks, 128 * ranks)):
        return None
    for start in range(vocab_size, rows, _ROWS_AT_ONCE):
        few = min(_ROWS_AT_ONCE, rows - start)
        block = torch.empty(few, width, dtype=reader.dtype(key))
        reader.read(Box(key, (start, 0), (few, width)), block)
        if len(learned := block.any(dim=1).nonzero()):
            return start + int(learned[0])
    return None


@torch.no_grad()
def load(chunks: list[T1GPTModel], spec: ModelSpec, folder: Path) -> None:
    """Fill this rank's chunks of the model from a Megatron checkpoint of any layout. Collective.

    Raises:
        CheckpointError: not the checkpoint of such a model.
    """
    reader = TorchDistReader(folder)
    params = [param for chunk in chunks for param in stored_params(chunk, spec)]
    check_keys(params, reader)
    for param in params:
        param.read(reader, param.tensor)


class MegatronCheckpoint:
    """The weights of a Megatron checkpoint as Hugging Face tensors, one at a time, in one process."""

    def __init__(self, folder: Path, hf_dir: Path, dtypes: dict[str, torch.dtype]) -> None:
        """
        Args:
            hf_dir: where config.json is.
            dtypes: of the Hugging Face tensors that are stored in another precision than their own.
        """
        self.folder = folder
        self._reader = TorchDistReader(folder)
        params = meta_params(hf_dir)
        check_keys(params, self._reader)
        self._carried = Carried(folder if (folder / CARRIED).exists() else hf_dir, spec_of(hf_dir).carried)
        self._param_of: dict[str, StoredParam] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for param in params:
            stored = self._reader.dtype(min(param.keys))
            for piece in param.pieces:
                self._param_of[piece.name] = param
                self.tensors[piece.name] = TensorInfo(dtypes.get(piece.name, stored), piece.shape)
        self.tensors |= self._carried.tensors
        self._buffers = TwoBuffers()
        self._last: tuple[StoredParam, list[Piece]] | None = None  # a fused parameter makes several tensors

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; possibly a view, good until tensors of two other parameters are read."""
        if name in self._carried.tensors:
            return self._carried.read(name)
        param, info = self._param_of[name], self.tensors[name]
        if self._last is None or self._last[0] is not param:
            memory = self._buffers.empty(tuple(param.tensor.shape), self._reader.dtype(min(param.keys)))
            param.read(self._reader, memory)
            self._last = (param, param.views(memory))
        found = [piece for piece in self._last[1] if piece.name == name]
        if len(found) == 1 and found[0].view.numel() * info.dtype.itemsize == info.num_bytes:
            return found[0].view.reshape(info.shape).to(info.dtype)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for piece in found:
            target = whole[piece.index]
            target.copy_(piece.view.reshape(target.shape))
        return whole


def meta_params(folder: Path) -> list[StoredParam]:
    """Every weight of the model that the folder's config.json describes, uncut and without memory.

    The caller's generators and process group are left as they were.
    """
    platform, parallel, spec = setup(), ParallelConfig(), spec_of(folder)
    meta = torch.device("meta")
    with _generators_kept(), _groups_kept():
        initialize(parallel, platform, 0)
        with meta:
            _, chunks = build_model(ModelConfig(hf_path=str(folder), layers="local"), spec, parallel, platform, meta)
        return [param for chunk in chunks for param in stored_params(chunk, spec)]


@contextmanager
def _generators_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _groups_kept() -> Iterator[None]:
    """Megatron's groups are needed to build a model, and are in nobody's way afterwards."""
    alone = not dist.is_initialized()
    try:
        yield
    finally:
        if alone and dist.is_initialized():
            mpu.destroy_model_parallel()
            dist.destroy_process_group()
