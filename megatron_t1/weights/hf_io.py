"""Hugging Face folders into and out of the ranks' weights.

Reading opens only the slices that this rank needs. Writing gathers one tensor after the other on rank 0 and swaps the
finished folder in at the end, so a killed export leaves no folder that looks whole. Padded vocabulary rows never come
here: `models.weight_map.Vocab` cuts them off.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_t1.files import need_space
from megatron_t1.models.weight_map import Piece
from megatron_t1.warn import warn
from megatron_t1.weights.hf_folder import (
    CheckpointError,
    HFFolder,
    ShardWriter,
    TensorInfo,
    copied_beside,
    has_weights,
    name_dtype,
)
from megatron_t1.weights.plan import Plan

MAX_SHARD_BYTES = 4 << 30
# Left by old exporters; computed, not learned.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


CARRIED = "carried"
"""Folder in a Megatron checkpoint for tensors that no Megatron model has."""


class Carried:
    """The tensors of a checkpoint that training leaves alone (`ModelSpec.carried`), for an export to take along."""

    def __init__(self, folder: Path, prefixes: tuple[str, ...]) -> None:
        """
        Args:
            folder: a Hugging Face folder, possibly of config and tokenizer only, or a Megatron checkpoint that was
                converted from one.
        """
        self.tensors: dict[str, TensorInfo] = {}
        source = folder / CARRIED if (folder / CARRIED).exists() else folder
        if prefixes and has_weights(source):
            self._source = HFFolder(source)
            self.tensors = {n: info for n, info in self._source.tensors.items() if n.startswith(prefixes)}
        if prefixes and not self.tensors:
            warn(
                f"{folder} has no {prefixes[0]}*, which its config.json speaks of and training leaves alone: an export "
                "lacks them. The folder that the training began with has them: t1 convert to-hf --hf FOLDER"
            )

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)


def load(pieces: list[Piece], model_dir: Path, carried: tuple[str, ...] = ()) -> None:
    """Fill this rank's parameters from a Hugging Face folder. Collective: coverage is checked over all ranks.

    Args:
        carried: prefixes of tensors that are left alone (`ModelSpec.carried`).

    Raises:
        CheckpointError: a tensor missing, misshapen, twice, or present in the folder and wanted by no rank.
    """
    folder = HFFolder(model_dir)
    wanted = {piece.name: piece.shape for piece in pieces}
    if dist.is_initialized():
        everyone: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, wanted)
        wanted = {name: shape for one in everyone for name, shape in one.items()}
    check_coverage(folder, wanted, carried)
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(folder.file_of(piece.name), []).append(piece)
    for path, inside in by_file.items():
        with safe_open(path, "pt") as file:
            for piece in inside:
                piece.view.copy_(file.get_slice(piece.name)[piece.index].reshape(piece.view.shape))


def check_coverage(folder: HFFolder, wanted: Mapping[str, tuple[int, ...]], carried: tuple[str, ...]) -> None:
    """The folder holds these tensors, in these shapes, and no other but those with a prefix in `carried`.

    Raises:
        CheckpointError: one that is missing, misshapen or not used, by name.
    """
    have = folder.tensors
    if missing := sorted(wanted.keys() - have.keys()):
        raise CheckpointError(f"{folder.folder} lacks {len(missing)} tensors, the first: {missing[:5]}")
    for name, shape in wanted.items():
        if have[name].shape != shape:
            raise CheckpointError(
                f"{folder.file_of(name)}: {name} has shape {have[name].shape}, the config asks for {shape}"
            )
    unread = (name for name in unused(folder, wanted) if not name.startswith(carried))
    if extra := [name for name in unread if not repeats_the_embedding(folder, name, wanted)]:
        raise CheckpointError(
            f"{folder.folder} has {len(extra)} tensors that the model does not use, the first: {extra[:5]}"
        )


class Readable(Protocol):
    """A checkpoint of either kind."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor: ...


def unused(folder: Readable, wanted: Iterable[str]) -> list[str]:
    """The folder's tensors outside of `wanted`, but for those that are known to be computed."""
    return sorted(name for name in folder.tensors.keys() - set(wanted) if not name.endswith(_IGNORED_SUFFIX))


def repeats_the_embedding(folder: Readable, name: str, wanted: Container[str]) -> bool:
    """A tied checkpoint may repeat the embedding as the head; it may not bring a different head."""
    embedding = "model.embed_tokens.weight"
    return (
        name == "lm_head.weight"
        and embedding in wanted
        and folder.tensors[name] == folder.tensors[embedding]
        and torch.equal(folder.read(name), folder.read(embedding))
    )


def save(
    pieces: list[Piece],
    like_dir: Path,
    out_dir: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    carried: tuple[str, ...] = (),
) -> None:
    """Write the ranks' weights as a Hugging Face folder: safetensors, and of `like_dir` config and tokenizer files and
    the tensors with a prefix in `carried`.

    Collective. `out_dir` is replaced as a whole at the end; rank 0 holds one tensor at a time.

    Raises:
        OSError: the disk is too full, known before a byte is written, or writing failed. What was written is removed.
    """
    plan = Plan(pieces)
    if plan.rank != 0:
        for _ in plan.gather():
            pass
    else:
        out_dir = out_dir.resolve()  # a link to a larger disk stays one, and what is built is built there
        building, old = (out_dir.with_name(out_dir.name + suffix) for suffix in (".tmp", ".old"))
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            _build(plan, like_dir, building, max_shard_bytes, carried)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if out_dir.exists():
            os.rename(out_dir, old)
        os.rename(building, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def _build(plan: Plan, like_dir: Path, building: Path, max_shard_bytes: int, carried: tuple[str, ...]) -> None:
    """Rank 0: the whole folder, under the name that it has until then."""
    announced = {tensor.name: TensorInfo(tensor.dtype, tensor.shape) for tensor in plan.tensors}
    extra = Carried(like_dir, carried)
    need_space(building.with_suffix(""), sum(info.num_bytes for info in (announced | extra.tensors).values()))
    if lacking := copied_beside(like_dir, building):
        warn(
            f"{building.with_suffix('')} will lack config or tokenizer, which could not be copied ({lacking}): copy "
            "them there from another copy of the model's folder"
        )
    if (building / "config.json").exists():
        name_dtype(building / "config.json", plan.tensors[0].dtype)
    writer = ShardWriter(building, announced | extra.tensors, max_shard_bytes)
    for name, tensor in chain(plan.gather(), ((name, extra.read(name)) for name in extra.tensors)):
        writer.write(name, tensor)
    writer.finish()
