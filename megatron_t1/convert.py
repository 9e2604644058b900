"""`t1 convert`: Hugging Face folder -> Megatron checkpoint -> Hugging Face folder, byte for byte, and comparing two.

    to_megatron: for each parameter: read its tensors -> lay them out as Megatron does -> append to the checkpoint
    to_hf:       for each tensor: read its parameter from the checkpoint -> write it at its place in a shard
    verify:      for each tensor: read it from both -> compare

One process on a CPU; what is in memory is one parameter being read and one being written. The result is built beside
OUT and renamed when it is whole and on the disk. A converted checkpoint loads at any layout: `tp` and `pp` say how its
files are cut, so that ranks of that layout read no more than their own.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_t1.engine.config import ParallelConfig
from megatron_t1.engine.layout import check_divisible
from megatron_t1.engine.stored import MegatronCheckpoint, StoredParam, meta_params
from megatron_t1.files import new_folder, read_json, write_json
from megatron_t1.models import spec_of
from megatron_t1.weights.buffers import TwoBuffers
from megatron_t1.weights.hf_folder import (
    DTYPES,
    SPELLING,
    CheckpointError,
    HFFolder,
    ShardWriter,
    copy_beside,
    is_torch_dist,
    name_dtype,
)
from megatron_t1.weights.hf_io import (
    CARRIED,
    MAX_SHARD_BYTES,
    Carried,
    Readable,
    check_coverage,
    repeats_the_embedding,
    unused,
)
from megatron_t1.weights.torch_dist import TorchDistWriter, cut

_DTYPES_FILE = "hf_dtypes.json"
# Boxes are cut to this size, so that whoever reads a part of a large tensor does not load all of it.
_MAX_BOX_BYTES = 256 << 20
_COMPARED = 1 << 24  # numbers compared at a time
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Converted:
    out: Path
    num_tensors: int
    num_bytes: int
    seconds: float

    def describe(self) -> str:
        rate = self.num_bytes / 1e6 / self.seconds
        return (
            f"{self.out}: {self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB "
            f"in {self.seconds:.1f} s ({rate:.0f} MB/s)"
        )


def to_megatron(hf_dir: Path, out: Path, *, tp: int = 1, pp: int = 1) -> Converted:
    """Write the Hugging Face folder `hf_dir` as the Megatron checkpoint `out`, with config and tokenizer beside.

    Raises:
        ValueError: a model that is not known, weights that are not its weights, or sizes that tp and pp do not divide.
        OSError: `out` exists, or the disk is too full.
    """
    began = time.perf_counter()
    spec = spec_of(hf_dir)
    layout = ParallelConfig(tensor=tp, pipeline=pp, sequence_parallel=tp > 1)
    check_divisible(spec, layout)
    layers_of_stages = layout.layers_of_stages(spec.transformer["num_layers"])
    source = HFFolder(hf_dir)
    params = meta_params(hf_dir)
    names = {piece.name: piece.shape for param in params for piece in param.pieces}
    check_coverage(source, names, spec.carried)
    carried = Carried(hf_dir, spec.carried)
    stored_dtypes = _stored_dtypes(params, source)
    num_bytes = sum(source.tensors[name].num_bytes for name in names)
    needed = num_bytes + sum(info.num_bytes for info in carried.tensors.values())
    with new_folder(out, needed) as building, _progress("to-megatron", num_bytes) as done:
        copy_beside(hf_dir, building)
        changed = {
            piece.name: SPELLING[source.tensors[piece.name].dtype]
            for param in params
            for piece in param.pieces
            if source.tensors[piece.name].dtype != stored_dtypes[min(param.keys)]
        }
        if changed:
            write_json(building / _DTYPES_FILE, changed)
        if carried.tensors:
            (building / CARRIED).mkdir()
            beside = ShardWriter(building / CARRIED, carried.tensors, MAX_SHARD_BYTES)
            for name in carried.tensors:
                beside.write(name, carried.read(name))
            beside.finish()
        writer, buffers = TorchDistWriter(building), TwoBuffers()
        with _behind() as write:
            for param in params:
                tensor = buffers.empty(tuple(param.tensor.shape), stored_dtypes[min(param.keys)])
                _assemble(param, source, tensor)
                write(partial(_append, writer, param, tensor, tp, _stage(param, layers_of_stages)))
                done(sum(source.tensors[piece.name].num_bytes for piece in param.pieces))
        writer.finish()
    return Converted(out, len(names), num_bytes, time.perf_counter() - began)


def to_hf(
    checkpoint: Path, out: Path, *, hf_dir: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Converted:
    """Write a Megatron checkpoint, converted or left by training, as the Hugging Face folder `out`.

    Args:
        hf_dir: where config.json and tokenizer are, when they are not in the checkpoint's folder.

    Raises:
        ValueError: not a checkpoint, or not of the model that config.json describes.
        OSError: `out` exists, or the disk is too full.
    """
    began = time.perf_counter()
    source = open_megatron(checkpoint, hf_dir)
    num_bytes = sum(info.num_bytes for info in source.tensors.values())
    with new_folder(out, num_bytes) as building, _progress("to-hf", num_bytes) as done:
        copy_beside(hf_dir or checkpoint, building)
        by_dtype: dict[torch.dtype, int] = {}
        for info in source.tensors.values():
            by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.num_bytes
        name_dtype(building / "config.json", max(by_dtype, key=by_dtype.__getitem__))
        writer = ShardWriter(building, source.tensors, max_shard_bytes)
        with _behind() as write:
            for name, info in source.tensors.items():
                write(partial(writer.write, name, source.read(name)))
                done(info.num_bytes)
        writer.finish()
    return Converted(out, len(source.tensors), num_bytes, time.perf_counter() - began)


@dataclass(frozen=True)
class Difference:
    name: str
    what: str
    largest: float = 0.0
    """Of the numbers, where these can be compared."""


def verify(a: Path, b: Path, *, hf_dir: Path | None = None) -> Iterator[Difference]:
    """Every difference between two checkpoints of either kind, tensor by tensor; none when they are the same bytes.

    Args:
        hf_dir: config.json for a Megatron checkpoint that has none beside it.
    """
    left, right = _open(a, hf_dir), _open(b, hf_dir)
    only_left = _learned_only_in(left, right)
    with _progress("verify", sum(info.num_bytes for info in left.tensors.values())) as done:
        for name, info in left.tensors.items():
            other = right.tensors.get(name)
            if other is None:
                if name in only_left:
                    yield Difference(name, f"only in {a}")
            elif info.shape != other.shape:
                yield Difference(name, f"shape {info.shape} and {other.shape}")
            else:
                if info.dtype != other.dtype:
                    yield Difference(name, f"dtype {info.dtype} and {other.dtype}")
                if found := _compare(name, left.read(name), right.read(name)):
                    yield found
            done(info.num_bytes)
    for name in _learned_only_in(right, left):
        yield Difference(name, f"only in {b}")


def _learned_only_in(one: Readable, other: Readable) -> list[str]:
    """Its tensors that the other lacks, but for those that are computed or repeat the tied embedding."""
    return [name for name in unused(one, other.tensors) if not repeats_the_embedding(one, name, other.tensors)]


def verify_and_say(a: Path, b: Path, *, hf_dir: Path | None = None) -> int:
    """Print the first differences, how many tensors differ and by how much; returns the exit code."""
    names, largest = set(), 0.0
    for difference in verify(a, b, hf_dir=hf_dir):
        names.add(difference.name)
        largest = max(largest, difference.largest)
        if len(names) <= _MAX_SHOWN:
            tqdm.write(f"{difference.name}: {difference.what}")
    if names:
        print(f"{a} and {b} differ in {len(names)} tensors, by at most {largest:.3g}")
        return 1
    print(f"{a} and {b} are the same: names, shapes, dtypes and every byte")
    return 0


def open_megatron(folder: Path, hf_dir: Path | None = None) -> MegatronCheckpoint:
    """A checkpoint of ours: weights, and the dtypes that its Hugging Face tensors had where they differ."""
    recorded = folder / _DTYPES_FILE
    names = read_json(recorded, dict[str, str]) if recorded.exists() else {}
    try:
        dtypes = {name: DTYPES[spelling] for name, spelling in names.items()}
    except KeyError as error:
        raise CheckpointError(f"{recorded} names a dtype {error}, which is not known") from None
    if not (config := (hf_dir or folder) / "config.json").exists():
        raise CheckpointError(f"{config} does not exist: give the model's Hugging Face folder with --hf")
    return MegatronCheckpoint(folder, hf_dir or folder, dtypes)


def _open(folder: Path, hf_dir: Path | None) -> HFFolder | MegatronCheckpoint:
    return open_megatron(folder, hf_dir) if is_torch_dist(folder) else HFFolder(folder)


def _stored_dtypes(params: list[StoredParam], source: HFFolder) -> dict[str, torch.dtype]:
    """The precision of each tensor: one that holds exactly all that Megatron stacks or fuses in it."""
    dtypes: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for param in params:
        for piece in param.pieces:
            for key in param.keys:
                dtype = source.tensors[piece.name].dtype
                first.setdefault(key, piece.name)
                try:
                    dtypes[key] = torch.promote_types(dtypes.get(key, dtype), dtype)
                except RuntimeError:  # of 8 bits
                    name, other = sorted((piece.name, first[key]), key=lambda name: source.tensors[name].dtype.itemsize)
                    raise CheckpointError(
                        f"{source.file_of(name)}: tensor {name} has {source.tensors[name].dtype}, which can't be "
                        f"stored in one tensor with {other} in {source.tensors[other].dtype}; take the release that "
                        "is not quantised"
                    ) from None
    return dtypes


def _assemble(param: StoredParam, source: HFFolder, into: torch.Tensor) -> None:
    """The parameter as Megatron lays it out; rows that pad the vocabulary are 0."""
    if sum(piece.view.numel() for piece in param.pieces) < into.numel():
        into.zero_()
    for piece in param.views(into):
        info = source.tensors[piece.name]
        if info.dtype == into.dtype and piece.view.nbytes == info.num_bytes and piece.view.is_contiguous():
            source.read(piece.name, into=piece.view)
        else:
            piece.view.copy_(source.read(piece.name)[piece.index].reshape(piece.view.shape))


def _append(writer: TorchDistWriter, param: StoredParam, tensor: torch.Tensor, tp: int, stage: int) -> None:
    for part in param.parts(tensor):
        for rank, (box, numbers) in enumerate(cut(part.box, part.data, param.cut_dim, tp)):
            for smaller, few in cut(box, numbers, 0, -(-numbers.nbytes // _MAX_BOX_BYTES)):
                writer.write(smaller, few, full_shape=part.full_shape, file_name=f"__{stage * tp + rank}_0")


def _stage(param: StoredParam, layers_of_stages: tuple[int, ...]) -> int:
    """The pipeline stage that reads this parameter."""
    if param.layer is not None:
        return bisect_right(list(accumulate(layers_of_stages)), param.layer)
    return 0 if param.name.startswith("embedding.") else len(layers_of_stages) - 1


def _compare(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference | None:
    """How two tensors of one shape differ: in bits when they are of one dtype, else in value."""
    a, b = a.reshape(-1), b.reshape(-1)
    count, first, largest = 0, -1, 0.0
    for start in range(0, a.numel(), _COMPARED):
        x, y = a[start : start + _COMPARED], b[start : start + _COMPARED]
        if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            continue
        x, y = x.double(), y.double()
        differs = (x != y) & ~(x.isnan() & y.isnan()) | (x.signbit() != y.signbit())
        if differs.any():
            count += int(differs.sum())
            first = first if first >= 0 else start + int(differs.nonzero()[0])
            apart = (x - y)[differs].abs().nan_to_num(nan=math.inf, posinf=math.inf)  # of a number and none
            largest = max(largest, float(apart.max()))
    if count == 0:
        return None
    what = (
        f"{count} of {a.numel()} numbers differ, by at most {largest:.3g}; "
        f"the first is number {first}: {a[first].item():.9g} and {b[first].item():.9g}"
    )
    return Difference(name, what, largest)


@contextmanager
def _progress(what: str, num_bytes: int) -> Iterator[Callable[[int], object]]:
    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, miniters=1) as bar:
        yield bar.update


@contextmanager
def _behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs what it is given in a thread, one at a time: the next parameter is read while the last one is written."""
    with ThreadPoolExecutor(1) as pool:
        running: Future[None] | None = None

        def write(work: Callable[[], None]) -> None:
            nonlocal running
            if running:
                running.result()
            running = pool.submit(work)

        yield write
        if running:
            running.result()
