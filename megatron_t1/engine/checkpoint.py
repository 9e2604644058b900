"""Checkpoints: Megatron's `torch_dist` format, so any layout resumes any other; whole or not there, and proved.

A checkpoint is written to `step_N.tmp`, brought to the disk, and renamed when every rank has finished, so an
interrupted one is never picked up. It holds weights, optimizer, learning-rate schedule, the anchor's average, and
`state.json` with what the loop needs to go on and every file's size and digest. A run resumes from the newest one whose
files are what was written, and says which it passed over. There is no generator state in it: training draws nothing at
random, and data order and sampling seeds are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.engine.resume_check import changes, check_changes
from megatron_t1.engine.step import Engine
from megatron_t1.files import read_json
from megatron_t1.warn import warn

_STEP = re.compile(r"^step_(\d{8})$")
_HYPERPARAMETERS = ("max_lr", "min_lr", "betas", "eps")
# Gathers the optimizer's state in the model's own shapes: loads at any TP, PP and DP.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


def finished(folder: Path, until: float = math.inf) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first, of at most `until` steps: of a run that is there, later ones
    are damaged and were passed over by `to_resume`."""
    found = sorted(path for path in folder.glob("step_*") if _STEP.match(path.name)) if folder.exists() else []
    return [path for path in found if step_of(path) <= until]


def step_of(checkpoint: Path) -> int:
    """Steps that a finished checkpoint holds, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def sharded_state(engine: Engine, anchor: Anchor | None, is_loading: bool) -> dict[str, Any]:
    models = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(engine.chunks)}
    _count_steps_without_parameters(engine)
    with _padding_counted(engine), _alone_ungathered(engine):
        optimizer = engine.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_METADATA)
    state: dict[str, Any] = {**models, "optimizer": optimizer, "scheduler": engine.scheduler.state_dict()}
    if anchor is not None:
        average = {id(w): a for w, a in zip(anchor.weights, anchor.average, strict=True)}
        for number, chunk in enumerate(anchor.chunks):
            shards = chunk.sharded_state_dict(prefix="anchor.")
            for shard in nested_values(shards):
                # In bfloat16 the forward pass's weights are roundings of the average; the average is what must survive.
                # A gated MLP's first matrix comes as a factory of its two halves, which take the dtype from the data.
                if isinstance(shard, ShardedTensor | ShardedTensorFactory) and id(shard.data) in average:
                    shard.data = average[id(shard.data)].data
                    if isinstance(shard, ShardedTensor):
                        shard.dtype = shard.data.dtype
            state[f"anchor{number}"] = shards
    return state


def _count_steps_without_parameters(engine: Engine) -> None:
    """A pipeline stage without experts has an optimizer of none, and Megatron asks torch's AdamW, whose state is by
    parameter, for the number of its step."""
    inners = [part.optimizer for part in engine.optimizer.chained_optimizers]
    for inner in inners:  # Adams of Transformer Engine and Apex count elsewhere, and have no `step` to look for
        if isinstance(inner, torch.optim.AdamW) and not any(group["params"] for group in inner.param_groups):
            step = next(state["step"] for other in inners for state in other.state.values())
            inner.state["no parameter"] = {"step": step.clone()}


@contextlib.contextmanager
def _padding_counted(engine: Engine) -> Iterator[None]:
    """Megatron gathers the optimizer's buckets without the padding at their ends, then cuts the parameters out at
    offsets that count it: from the second bucket on it would save the wrong numbers."""
    parts = [part for part in engine.optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    buffers = [buffer for part in parts for buffer in part.buffers]
    padded = [*buffers, *(bucket for buffer in buffers for bucket in buffer.buckets)]
    unpadded = [part.numel_unpadded for part in padded]
    for part in padded:
        part.numel_unpadded = part.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in zip(padded, unpadded, strict=True):
            part.numel_unpadded = numel


@contextlib.contextmanager
def _alone_ungathered(engine: Engine) -> Iterator[None]:
    """Where the optimizer's state is not spread over ranks, Megatron's gather would copy it to the GPU and back,
    through three buffers of its size on the host. `writers` brings it there."""
    parts = [part for part in engine.optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    alone = [part for part in parts if part.data_parallel_group.size() == 1]
    for part in alone:
        part.get_parameter_state_dp_zero = partial(_state_of_one_rank, part)
    try:
        yield
    finally:
        for part in alone:
            del part.get_parameter_state_dp_zero


class _Apart(dict[int, torch.Tensor]):
    """By its first number, what Megatron cuts out of a buffer: parts of a whole it would copy once more."""

    def __getitem__(self, where: slice) -> torch.Tensor:  # type: ignore[override]
        return super().__getitem__(where.start)


def _state_of_one_rank(part: DistributedOptimizer, *, empty_data: bool, **_: bool) -> dict[Any, Any]:
    """What `DistributedOptimizer.get_parameter_state_dp_zero` returns: the numbers themselves, where they are."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = ranges.items()
        keys = ("param", "exp_avg", "exp_avg_sq")
        whole: dict[str, Any] = {key: torch.zeros(buffer.numel_unpadded) if empty_data else _Apart() for key in keys}
        for param in (param for bucket in buckets for param in bucket["param_map"]) if not empty_data else ():
            tensors = part._get_main_param_and_optimizer_states(param)
            for key, apart in whole.items():
                apart[buffer.param_index_map[param][0]] = tensors[key].detach().flatten()
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


class _State(TypedDict):
    step: int
    score: NotRequired[float]
    files: NotRequired[dict[str, tuple[int, str]]]
    experts_apart: NotRequired[bool]
    distributed_optimizer: NotRequired[bool]
    settings: NotRequired[dict[str, Any]]


def state_of(path: Path) -> dict[str, Any]:
    """What `state.json` says; {} when it is not there or is none."""
    try:
        return read_json(path / "state.json", _State)
    except (OSError, ValueError):
        return {}


def merged(mine: dict[str, Any]) -> dict[str, Any]:
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: value for part in everyone for name, value in part.items()}


def damage(path: Path) -> str | None:
    """Collective. What is wrong with a checkpoint's files, or None when they are what was written."""
    state = from_main(state_of(path) if is_main() else None)
    if "step" not in state:
        return "it has no readable state.json"
    problems = merged(_spoiled(path, state.get("files", {}), dist.get_rank(), dist.get_world_size()))
    return "; ".join(problems[name] for name in sorted(problems)) or None


def _spoiled(path: Path, files: dict[str, tuple[int, str]], rank: int, world: int) -> dict[str, str]:
    """File -> what is wrong with it, of this rank's share of them."""
    found: dict[str, str] = {} if files else {"state.json": "state.json names no files"}
    for name, (size, digest) in list(files.items())[rank::world]:
        try:
            with (path / name).open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    found[name] = f"{name} has {actual} bytes, {size} were written"
                elif hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    found[name] = f"{name} has other contents than were written"
        except OSError as error:
            found[name] = f"{name} can't be read ({error.strerror})"
        except ValueError:
            found[name] = f"{name!r} is no name of a file"
    return found


@torch.no_grad()
def load(path: Path, engine: Engine, anchor: Anchor | None) -> dict[str, Any]:
    """Collective. Fill engine and anchor from a checkpoint of any layout; returns its `state.json`.

    Raises:
        ValueError: not a finished checkpoint, one from before or after the experts or the optimizer were spread over
            ranks, one without the anchor that is asked for, or one of local layers for Transformer Engine's.
    """
    if not (path / "state.json").exists():
        raise ValueError(f"{path} is not a finished checkpoint: it has no state.json")
    state = read_json(path / "state.json", _State)
    # With expert parallelism Megatron has an optimizer of its own for the experts, which loads no other's state.
    if state.get("experts_apart", False) != (engine.parallel.expert > 1):
        raise ValueError(
            f"{path} was written with parallel.expert {'above' if state.get('experts_apart') else 'of'} 1 and is "
            f"loaded with {engine.parallel.expert}: its optimizer does not fit. Resume with such a layout, or export "
            "the weights (t1 convert to-hf) and start from them"
        )
    spread = engine.parallel.distributed_optimizer
    if state.get("distributed_optimizer", spread) != spread:
        raise ValueError(
            f"{path} was written with parallel.distributed_optimizer = {not spread} and is loaded with {spread}: its "
            f"optimizer does not fit. Resume with --parallel.distributed_optimizer {str(not spread).lower()}, or "
            "export the weights (t1 convert to-hf) and start from them"
        )
    if anchor is not None and not state.get("anchor", True):
        raise ValueError(
            f"{path} was written with loss.kl_coef = 0 and holds no anchor. Resume with --loss.kl_coef 0, or export "
            "the weights (t1 convert to-hf) and start from them in another run_dir: they are its first anchor then"
        )
    _prime(engine)
    try:
        loaded = dist_checkpointing.load(sharded_state(engine, anchor, is_loading=True), str(path))
    except CheckpointException as error:  # a BaseException: it would pass by every handler above
        reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        if re.search(r"(Missing key in checkpoint state_dict: |KeyError: \W*)\S*_extra_state", reasons):
            raise ValueError(
                f"{path} was written with model.layers = local and can't go on with Transformer Engine's layers: it "
                "lacks what these keep (_extra_state). Resume with --model.layers local, or export the weights (t1 "
                "convert to-hf) and start from them"
            ) from error
        raise ValueError(f"{path} can't be loaded ({reasons})") from error
    for number, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    _load_optimizer(engine, loaded["optimizer"])
    engine.scheduler.load_state_dict(loaded["scheduler"])
    if anchor is not None:
        average = {id(w): a for w, a in zip(anchor.weights, anchor.average, strict=True)}
        for number, chunk in enumerate(anchor.chunks):
            for name, weight in chunk.named_parameters():
                average[id(weight)].copy_(loaded[f"anchor{number}"][f"anchor.{name}"])
        anchor.publish()
    return state


def _load_optimizer(engine: Engine, state: Any) -> None:
    """With the hyperparameters of this run: Megatron's loading brings back those of the checkpoint, and its schedule
    takes the parameter groups' word."""
    own = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in engine.optimizer.param_groups]
    engine.optimizer.load_state_dict(state)
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)


def _prime(engine: Engine) -> None:
    """Make torch's AdamW loadable by Megatron's distributed optimizer, which expects the Adam of Apex or its like.

    torch's makes its state in its first step only, where Megatron asks for it before loading; and it keeps a `step`
    tensor a parameter, which Megatron forgets to bring along, and shares between all parameters so that each of them
    would count it up.
    """
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for param in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[param]:
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[param] = {"step": torch.zeros(()), **moments}
        if hasattr(part, "model_param_group_index_map"):
            part._set_main_param_and_optimizer_states = partial(_set_states_with_step, part)


def _set_states_with_step(part: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    state["step"] = state["step"].clone()
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**tensors, "step": state["step"]})


def begun(folder: Path, *, allowed: bool) -> list[Path]:
    """Collective. The finished checkpoints of a run that may have begun in `folder`, oldest first.

    Raises:
        ValueError: there are some and the user did not ask to resume.
    """
    checkpoints: list[Path] = from_main(finished(folder) if is_main() else [])
    if checkpoints and not allowed:
        raise ValueError(f"{checkpoints[-1]} is there already: give --resume to go on from it, or another run_dir")
    return checkpoints


def to_resume(folder: Path, *, allowed: bool, settings: dict[str, Any], may_change: bool) -> Path | None:
    """Collective. The newest undamaged checkpoint in `folder`, which the run goes on from; None when there is none.

    It needs no model: what is refused is refused before one is built.

    Args:
        settings: rank 0's, what decides the training (`resume_check.py`); `save` was given the same in its state.
        may_change: go on where they differ from the checkpoint's.

    Raises:
        ValueError: there is a checkpoint and the user did not ask to resume; or of other settings; or all of them are
            damaged.
    """
    checkpoints = begun(folder, allowed=allowed)
    if not checkpoints:
        return None
    path = newest_whole(checkpoints)
    if path is None:
        raise ValueError(f"all {len(checkpoints)} checkpoints in {folder} are damaged; move them away to start anew")
    check_made_with(path, settings, may_change=may_change)
    return path


def newest_whole(checkpoints: list[Path]) -> Path | None:
    """Collective. The last of them that is not damaged; None when all are."""
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path
        if is_main():
            warn(f"checkpoint {path} is damaged: {problem}; looking at the one before")
    return None


def check_made_with(path: Path, settings: dict[str, Any], *, may_change: bool) -> None:
    """Collective. The checkpoint was made with these settings (rank 0's), or it is said and kept that they changed.

    Raises:
        ValueError: they changed, and that is not allowed.
    """
    state = from_main(state_of(path) if is_main() else None)
    changed = from_main(changes(state.get("settings", {}), settings) if is_main() else None)
    if is_main() or not may_change:
        check_changes(path, state.get("step", 0), changed, allowed=may_change)
