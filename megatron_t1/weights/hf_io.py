"""Hugging Face folders in and out: safetensors read by slice, written in shards, with everything beside them.

Reading opens only the slices that this rank needs. Writing gathers one tensor after the other on rank 0 and swaps the
finished folder in at the end, so a killed export leaves no folder that looks whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_t1.weights.ops import Piece
from megatron_t1.weights.stream import Plan

_INDEX = "model.safetensors.index.json"
# Left by old exporters; computed, not learned.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class CheckpointError(ValueError):
    """A Hugging Face folder that does not hold what its config promises."""


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
        CheckpointError: no safetensors there, or an index that names a missing file.
    """
    index = model_dir / _INDEX
    if index.exists():
        files = {name: model_dir / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        for path in sorted(set(files.values())):
            if path.parent != model_dir or not path.exists():
                raise CheckpointError(f"{index} names {path.name}, which is not in {model_dir}")
        return files
    single = model_dir / "model.safetensors"
    if not single.exists():
        raise CheckpointError(f"{model_dir} has neither {single.name} nor {_INDEX}: no weights in safetensors format")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def load(pieces: list[Piece], model_dir: Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder. Collective: coverage is checked over all ranks.

    Raises:
        CheckpointError: a tensor missing, misshapen, or present in the folder and wanted by no rank.
    """
    files = tensor_files(model_dir)
    wanted: set[str] = {piece.name for piece in pieces}
    if missing := sorted(wanted - files.keys()):
        raise CheckpointError(f"{model_dir} lacks {len(missing)} tensors, the first: {missing[:5]}")
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(files[piece.name], []).append(piece)
    for path, inside in by_file.items():
        with safe_open(path, "pt") as file:
            for piece in inside:
                source = file.get_slice(piece.name)
                if tuple(source.get_shape()) != piece.shape:
                    raise CheckpointError(
                        f"{path}: {piece.name} has shape {tuple(source.get_shape())}, the config asks for {piece.shape}"
                    )
                piece.view.copy_(source[piece.index].reshape(piece.view.shape))
    if dist.is_initialized():
        everyone: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(everyone, wanted)
        wanted = set().union(*everyone)
    extra = sorted(name for name in files.keys() - wanted if not name.endswith(_IGNORED_SUFFIX))
    # A tied checkpoint may repeat the embedding as the head; it may not bring a different head.
    if extra == ["lm_head.weight"] and "model.embed_tokens.weight" in wanted:
        with (
            safe_open(files["lm_head.weight"], "pt") as head,
            safe_open(files["model.embed_tokens.weight"], "pt") as em,
        ):
            if torch.equal(head.get_tensor("lm_head.weight"), em.get_tensor("model.embed_tokens.weight")):
                extra = []
    if extra:
        raise CheckpointError(
            f"{model_dir} has {len(extra)} tensors that the model does not use, the first: {extra[:5]}"
        )


def save(pieces: list[Piece], like_dir: Path, out_dir: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Write the ranks' weights as a Hugging Face folder: safetensors, and config and tokenizer files of `like_dir`.

    Collective. `out_dir` is replaced as a whole at the end; rank 0 holds at most one shard in memory.
    """
    plan = Plan(pieces)
    building = out_dir.with_name(out_dir.name + ".tmp")
    if plan.rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for path in like_dir.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt") and path.name != _INDEX:
                shutil.copy2(path, building)
        _name_dtype(building / "config.json", plan.tensors[0].dtype)
    shard: dict[str, torch.Tensor] = {}
    shard_names: list[list[str]] = []
    num_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, num_bytes
        shard_names.append(list(shard))
        save_file(shard, building / f"shard-{len(shard_names)}", metadata={"format": "pt"})
        shard, num_bytes = {}, 0

    for name, tensor in plan.gather():
        size = tensor.numel() * tensor.element_size()
        if shard and num_bytes + size > max_shard_bytes:
            flush()
        shard[name] = tensor
        num_bytes += size
        total_bytes += size
    if plan.rank == 0:
        flush()
        _name_shards(building, shard_names, total_bytes)
        old = out_dir.with_name(out_dir.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if out_dir.exists():
            os.rename(out_dir, old)
        os.rename(building, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """A model trained in another precision than its checkpoint came in must not be announced in the old one."""
    fields = json.loads(config.read_text())
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in fields else "dtype"
    if fields.get(key, name) != name:
        config.write_text(json.dumps({**fields, key: name}, indent=2) + "\n")


def _name_shards(folder: Path, shard_names: list[list[str]], total_bytes: int) -> None:
    count = len(shard_names)
    if count == 1:
        os.rename(folder / "shard-1", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shard_names, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.rename(folder / f"shard-{number}", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
