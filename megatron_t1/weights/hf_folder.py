"""A Hugging Face folder, tensor by tensor: what it holds, reading one at a time, writing shards without holding them.

Only safetensors: a `.bin` is a pickle, and unpickling runs code. The library checks a file's header (names, bounds, no
holes) before anything is read; the numbers then come by plain reads, because pages of a mapped file would count as
memory until the file is closed. It has no way to write a file tensor by tensor, so the header is written here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from megatron_t1.files import read_json
from megatron_t1.weights.buffers import bytes_of

INDEX = "model.safetensors.index.json"
TORCH_DIST_INDEX = ".metadata"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}
_LFS_POINTER = b"version https://git-lfs"
# Weights in any format, and what a Megatron checkpoint consists of: not carried from one folder to another.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".distcp", ".h5", ".msgpack", ".gguf", ".onnx"}
_WEIGHT_FILES = {"metadata.json", "state.json", "hf_dtypes.json"}


class CheckpointError(ValueError):
    """A checkpoint that does not hold what its config promises."""


@dataclass(frozen=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HFFolder:
    """The tensors of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: no safetensors, two sets of them, an index that is not true, a tensor in two files.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._location: dict[str, tuple[Path, int]] = {}
        indexed = _indexed(folder)
        for path in sorted(set(indexed.values())) if indexed else [folder / SINGLE]:
            for name, info, start in _contents(path):
                if name in self._location:
                    raise CheckpointError(f"tensor {name} is in {self._location[name][0].name} and in {path.name}")
                if indexed and indexed.get(name) != path:
                    raise CheckpointError(f"{path} holds tensor {name:.200}, which {INDEX} does not place there")
                self.tensors[name], self._location[name] = info, (path, start)
        if lost := sorted(indexed.keys() - self._location.keys()):
            raise CheckpointError(f"{folder / INDEX} lists {len(lost)} tensors that no file has, the first: {lost[:5]}")

    def file_of(self, name: str) -> Path:
        return self._location[name][0]

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor, on the CPU; in the memory of `into` when given (contiguous, of its dtype and size)."""
        info, (path, start) = self.tensors[name], self._location[name]
        tensor = torch.empty(info.shape, dtype=info.dtype) if into is None else into
        with path.open("rb") as file:
            try:
                read_bytes(file, start, tensor)
            except EOFError:
                raise CheckpointError(f"{path} ends within tensor {name}") from None
        return tensor


def has_weights(folder: Path) -> bool:
    """Whether the folder has safetensors, be they whole or not: config and tokenizer may be in one of their own."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder is a Megatron checkpoint, which `torch_dist.py` reads, and not one of Hugging Face."""
    return (folder / TORCH_DIST_INDEX).is_file()


def _indexed(folder: Path) -> dict[str, Path]:
    """Tensor name -> file as the index says it; empty when the folder has a single file and no index."""
    index, single = folder / INDEX, folder / SINGLE
    for path in (index, single):
        _refuse_dangling(path)
    if not index.exists():
        if not single.exists():
            megatron = (
                " (`t1 convert to-hf` makes them of a Megatron checkpoint)" if (folder / ".metadata").exists() else ""
            )
            raise CheckpointError(
                f"{folder} has neither {SINGLE} nor {INDEX}: no weights in safetensors format{megatron}"
            )
        if strays := sorted({path.name for path in folder.glob("*.safetensors")} - {SINGLE}):
            raise CheckpointError(
                f"{folder} has {', '.join(strays)} beside {SINGLE}, and vLLM would read them as its weights: move them "
                "to another folder (an adapter is merged into the weights first)"
            )
        return {}
    try:
        files = {name: folder / file for name, file in read_json(index, _Index)["weight_map"].items()}
    except ValueError as error:
        raise CheckpointError(f"{index} is no index of safetensors: {error!s:.500}") from None
    if not files:
        raise CheckpointError(f"{index} lists no tensors")
    there = {path.name for path in folder.iterdir()}
    for path in sorted(set(files.values())):
        if path.parent != folder or path.name not in there:
            raise CheckpointError(f"{index} names {path.name:.100}, which is not in {folder}")
    if single.exists() and single not in files.values():
        raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}, which does not name it: remove one of them")
    return files


class _Index(TypedDict):
    weight_map: dict[str, str]


def _contents(path: Path) -> Iterable[tuple[str, TensorInfo, int]]:
    """Name, dtype and shape, and first byte in the file of every tensor."""
    _refuse_dangling(path)
    try:
        with safe_open(path, "pt") as file:
            with path.open("rb") as raw:
                start = 8 + int.from_bytes(raw.read(8), "little")
            for name in file.offset_keys():  # the library has checked that they follow each other without holes
                stored = file.get_slice(name)
                if stored.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name:.200} has dtype {stored.get_dtype()}, which is not known"
                    )
                info = TensorInfo(DTYPES[stored.get_dtype()], tuple(stored.get_shape()))
                yield name, info, start
                start += info.num_bytes
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is what Git LFS keeps in the place of the weights: run git lfs pull in {path.parent}"
                ) from None
        raise CheckpointError(f"{path} is not a safetensors file: {error!s:.500}") from None


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there: download the model again")


class ShardWriter:
    """The safetensors of a folder, written tensor by tensor in any order, and their index.

    Names, dtypes and shapes are known beforehand, so every tensor's place is, and no more than one is in memory.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> None:
        self._folder, self._missing = folder, dict(tensors)
        self._location: dict[str, tuple[Path, int]] = {}
        shards: list[dict[str, TensorInfo]] = [{}]
        for name, info in tensors.items():
            if shards[-1] and sum(i.num_bytes for i in shards[-1].values()) + info.num_bytes > max_shard_bytes:
                shards.append({})
            shards[-1][name] = info
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            self._lay_out(
                folder / (SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"), shard
            )
        self.paths = sorted({path for path, _ in self._location.values()})

    def _lay_out(self, path: Path, shard: dict[str, TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        # In the library's own order: the widest first, so that every tensor is aligned.
        for name, info in sorted(shard.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            start, end = end, end + info.num_bytes
            places[name] = start
            header[name] = {"dtype": SPELLING[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        self._location |= {name: (path, 8 + len(text) + start) for name, start in places.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Every tensor once, with the dtype and shape that were announced."""
        announced, given = self._missing.pop(name), TensorInfo(tensor.dtype, tuple(tensor.shape))
        if announced != given:
            raise CheckpointError(f"tensor {name} is {given}, announced was {announced}")
        path, start = self._location[name]
        with path.open("rb+") as file:
            file.seek(start)
            file.write(bytes_of(tensor.contiguous()))

    def finish(self) -> None:
        """Bring the files to the disk and write the index, when there is more than one."""
        if self._missing:
            raise CheckpointError(f"{len(self._missing)} tensors were not written, the first: {min(self._missing)}")
        for path in self.paths:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if len(self.paths) > 1:
            weight_map = {name: path.name for name, (path, _) in self._location.items()}
            total = sum(path.stat().st_size - _header_bytes(path) for path in self.paths)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def read_bytes(file: BinaryIO, start: int, into: torch.Tensor) -> None:
    """Fill a contiguous tensor with what the file holds from `start` on.

    Raises:
        EOFError: it holds less.
    """
    file.seek(start)
    if file.readinto(bytes_of(into)) != into.nbytes:  # type: ignore[attr-defined]
        raise EOFError(f"it ends within {into.nbytes} bytes from {start} on")


def copy_beside(source: Path, target: Path) -> None:
    """Everything of a checkpoint that is not weights: config, tokenizer, chat template, generation config, licence."""
    for path in source.iterdir():
        if path.name.startswith(".") or path.suffix in _WEIGHT_SUFFIXES or path.name in _WEIGHT_FILES:
            continue
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)  # not its mode: it may be read-only, and the copy is edited
        elif path.is_dir() and path.name == "additional_chat_templates":
            (target / path.name).mkdir()
            for template in path.iterdir():
                if template.is_file():
                    shutil.copyfile(template, target / path.name / template.name)


def copied_beside(source: Path, target: Path) -> str | None:
    """`copy_beside`, for weights that must not be lost for want of the rest: the folder may be scratch that is purged,
    or another run's checkpoint. Returns why config or tokenizer are lacking."""
    try:
        copy_beside(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EACCES):
            raise
        return str(error)
    return None if (target / "config.json").exists() else f"{source} has no config.json"


def name_dtype(config: Path, dtype: torch.dtype) -> None:
    """A model in another precision than its checkpoint came in must not be announced in the old one."""
    fields = read_json(config, dict[str, Any])
    name = str(dtype).removeprefix("torch.")
    named = {key: name for key in ("torch_dtype", "dtype") if key in fields}  # old and new spelling, or both
    if fields != fields | named:
        config.write_text(json.dumps(fields | named, indent=2) + "\n")
