"""Megatron's `torch_dist` checkpoints (the files of torch.distributed.checkpoint), read and written box by box.

Megatron itself saves and loads the parameters of a model that is in memory. Here only the box in hand is: reading takes
from the files what overlaps with it, writing appends to a file and notes where. What Megatron writes can be read here,
and what is written here Megatron loads, at any layout.

A checkpoint may come from somebody else, and its index is a pickle: only the plain data classes of the format are let
through, and tensors are loaded with `weights_only`. Left out: the optimizer's state, and objects beside tensors.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, IOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config

from megatron_t1.files import write_json
from megatron_t1.weights.buffers import bytes_of
from megatron_t1.weights.hf_folder import TORCH_DIST_INDEX, CheckpointError, read_bytes

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Classes that an index consists of: they hold data and do nothing when they are made.
_HARMLESS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
# Where torch's own writer notes the folder; read as a path that no file system is asked about.
_PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
# What a run's checkpoint holds besides the weights.
_NOT_WEIGHTS = ("optimizer.", "chained_", "anchor.")


@dataclass(frozen=True)
class Box:
    """A rectangle of one tensor of a checkpoint. Megatron stacks the layers: one tensor for each kind of weight."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def cut(box: Box, tensor: torch.Tensor, dim: int, count: int) -> Iterator[tuple[Box, torch.Tensor]]:
    """A box and its numbers in up to `count` nearly equal parts along a dimension of the numbers, which may lack the
    box's leading stacking dimensions."""
    axis = len(box.shape) - tensor.dim() + dim
    start = box.offset[axis]
    for part in tensor.tensor_split(max(1, count), dim):
        if part.numel():
            offset, shape = list(box.offset), list(box.shape)
            offset[axis], shape[axis] = start, part.shape[dim]
            yield Box(box.key, tuple(offset), tuple(shape)), part
            start += part.shape[dim]


class TorchDistReader:
    """The weights of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: no index, or one that is not plain data.
        """
        self.folder = folder
        try:
            program = (folder / TORCH_DIST_INDEX).read_bytes()
            _check_sizes(program)
            metadata = _Restricted(BytesIO(program)).load()
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is not a Megatron checkpoint: it has no {TORCH_DIST_INDEX}") from None
        except Exception as error:  # damaged bytes are a program of pickle's small machine, which may raise anything
            raise CheckpointError(
                f"{folder / TORCH_DIST_INDEX} is not the index of a checkpoint: {type(error).__name__}: {error}"
            ) from None
        if problem := _index_problem(metadata):
            raise CheckpointError(f"{folder / TORCH_DIST_INDEX} is not the index of a checkpoint: {problem}")
        self._stored_at: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS)
        }

        self._by_place: dict[str, tuple[int, dict[tuple[int, ...], list[ChunkStorageMetadata]]]] = {}

    def keys(self) -> set[str]:
        return set(self._tensors)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def num_cuts(self, key: str) -> int:
        """Into how many equal parts its rows are cut, as by the ranks that wrote them; 1 where parts differ."""
        rows = {chunk.sizes[0] for chunk in self._tensors[key].chunks}
        return self.shape(key)[0] // rows.pop() if len(rows) == 1 and 0 not in rows else 1

    def read(self, box: Box, into: torch.Tensor) -> None:
        """Fill `into` (of the box's shape, in any precision) with the numbers of a box.

        Raises:
            CheckpointError: files that do not hold what the index says.
        """
        missing = math.prod(box.shape)
        for chunk in self._chunks_around(box):
            if overlap := _overlap(box, chunk):
                here, there = overlap
                self._load(box.key, chunk, there, into[here])
                missing -= into[here].numel()
        if missing != 0:
            raise CheckpointError(f"{self.folder}: {box.key} is not stored exactly once at {box.offset} of {box.shape}")

    def _chunks_around(self, box: Box) -> list[ChunkStorageMetadata]:
        """All chunks that a box may meet. Of a stack of thousands of experts it meets those of one."""
        chunks = self._tensors[box.key].chunks
        if box.key not in self._by_place:
            num_stacked = min((_num_leading_ones(chunk.sizes) for chunk in chunks), default=0)
            places: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                places.setdefault(tuple(chunk.offsets[:num_stacked]), []).append(chunk)
            self._by_place[box.key] = num_stacked, places
        num_stacked, places = self._by_place[box.key]
        if _num_leading_ones(box.shape) < num_stacked:
            return chunks
        return places.get(box.offset[:num_stacked], [])

    def _load(self, key: str, chunk: ChunkStorageMetadata, there: tuple[slice, ...], into: torch.Tensor) -> None:
        """Fill `into` with a part of a chunk: by plain reads when it is one run of bytes in the file and in memory."""
        where = f"{self.folder}: {key} at {tuple(chunk.offsets)}"
        storage = self._stored_at.get(MetadataIndex(key, chunk.offsets))
        if storage is None or storage.transform_descriptors:
            raise CheckpointError(f"{where} is not stored, or compressed")
        path = self.folder / storage.relative_path
        if path.parent != self.folder or not path.is_file():
            raise CheckpointError(f"{where} is said to be in {storage.relative_path}, which is not in the folder")
        dtype = self.dtype(key)
        with path.open("rb") as file:
            archive = _create_file_view(file, storage.offset, storage.length)
            try:
                stored = _without_numbers(archive)
                if not isinstance(stored, torch.Tensor) or stored.shape != chunk.sizes or stored.dtype != dtype:
                    raise ValueError(f"it should be {dtype} {tuple(chunk.sizes)} and is something else")
                part = stored[there]
                if part.is_contiguous() and into.is_contiguous() and into.dtype == dtype and into.device.type == "cpu":
                    start = stored.untyped_storage()._checkpoint_offset + part.storage_offset() * dtype.itemsize
                    read_bytes(file, storage.offset + start, into)
                else:
                    archive.seek(0)
                    into.copy_(torch.load(archive, map_location="cpu", weights_only=True)[there])
            except Exception as error:  # as of damaged bytes above
                told = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{where} can't be read from {path.name}: {told}") from None


def _without_numbers(archive: IOBase) -> Any:
    """What torch.save left in a file, on the `meta` device: its storages know where in the file they are."""
    records = torch._C.PyTorchFileReader(archive)
    if records.has_record("byteorder") and records.get_record("byteorder") != sys.byteorder.encode():
        raise ValueError("it was written on a machine of another byte order")  # torch would swap what is not there
    archive.seek(0)
    return torch.load(archive, map_location="meta", weights_only=True)


class TorchDistWriter:
    """A checkpoint of weights alone, written in any order. `finish` makes it one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._stored_at: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, box: Box, tensor: torch.Tensor, *, full_shape: tuple[int, ...], file_name: str) -> None:
        """
        Args:
            tensor: the numbers, with or without the box's leading dimensions of 1.
            full_shape: of the tensor that the box is cut from.
            file_name: without its ending, the file that takes it.
        """
        name = f"{file_name}.distcp"
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
        file = self._files[name]
        start = file.tell()
        # torch.save writes all that a view looks into: this one's memory begins and ends with its own numbers.
        alone = torch.frombuffer(bytes_of(tensor.contiguous()), dtype=tensor.dtype)
        # Only zip tools look at the checksums, and a file of several archives is none of theirs.
        with config.patch("save.compute_crc32", False):
            torch.save(alone.view(box.shape), file)
        offset = torch.Size(box.offset)
        if box.key not in self._tensors:
            properties = TensorProperties(dtype=tensor.dtype)
            self._tensors[box.key] = TensorStorageMetadata(properties, torch.Size(full_shape), [])
        self._tensors[box.key].chunks.append(ChunkStorageMetadata(offset, torch.Size(box.shape)))
        self._stored_at[MetadataIndex(box.key, offset)] = _StorageInfo(name, start, file.tell() - start)

    def finish(self) -> None:
        """Bring the files to the disk and write the index."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        torch.save({}, self._folder / "common.pt")
        write_json(self._folder / "metadata.json", _FORMAT)
        with (self._folder / TORCH_DIST_INDEX).open("wb") as file:
            pickle.dump(Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._stored_at), file)
            file.flush()
            os.fsync(file.fileno())


def _check_sizes(program: bytes) -> None:
    """Raises ValueError for a pickle that wants more memory than it has bytes."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if opcode.name == "BYTEARRAY8" or ("PUT" in opcode.name and int(argument or 0) > number):
            raise ValueError(f"{opcode.name} has no place in it")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if (module, name) in _PATHS:
            return PurePosixPath
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an index has no use for; do not load it")


def _index_problem(metadata: Any) -> str | None:
    """What is wrong with the parts of an index that are used; None when nothing is."""
    try:
        tensors, stored_at = metadata.state_dict_metadata, metadata.storage_data
        if not isinstance(metadata, Metadata) or not isinstance(tensors, dict) or not isinstance(stored_at, dict):
            return "it lacks the lists of tensors and of where they are"
        for key, tensor in tensors.items():
            if not isinstance(key, str):
                return f"a tensor is called {key!r:.80}"
            if isinstance(tensor, TensorStorageMetadata) and not _is_whole(tensor):
                return f"{key[:80]} has no dtype, or sizes that are none"
        for index, place in stored_at.items():
            known = isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo)
            if not known or not isinstance(place.relative_path, str) or "\0" in place.relative_path:
                return f"the place of {index!r:.80} is none"
            if not _are_sizes((place.offset, place.length)):
                return f"the place of {index!r:.80} is none"
    except AttributeError as error:
        return str(error)
    return None


def _is_whole(tensor: TensorStorageMetadata) -> bool:
    sizes = [tensor.size, *(part for chunk in tensor.chunks for part in (chunk.offsets, chunk.sizes))]
    same = all(isinstance(each, torch.Size) and len(each) == len(sizes[0]) and _are_sizes(each) for each in sizes)
    return same and isinstance(tensor.properties.dtype, torch.dtype)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _num_leading_ones(shape: tuple[int, ...]) -> int:
    return next((dim for dim, size in enumerate(shape) if size != 1), len(shape))


def _overlap(box: Box, chunk: ChunkStorageMetadata) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where the two meet, as an index into the box and one into the chunk."""
    here, there = [], []
    for start, size, chunk_start, chunk_size in zip(box.offset, box.shape, chunk.offsets, chunk.sizes, strict=True):
        first, last = max(start, chunk_start), min(start + size, chunk_start + chunk_size)
        if first >= last:
            return None
        here.append(slice(first - start, last - start))
        there.append(slice(first - chunk_start, last - chunk_start))
    return tuple(here), tuple(there)
