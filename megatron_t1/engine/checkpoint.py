"""Checkpoints: Megatron's `torch_dist` format, so any layout resumes any other; whole or not there.

A checkpoint is written to `step_N.tmp` and renamed when every rank has finished, so an interrupted one is never picked
up. It holds weights, optimizer, learning-rate schedule, the anchor's average, and `state.json` with what the loop needs
to go on. There is no generator state in it: training draws nothing at random, and data order and sampling seeds are
functions of (seed, step).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.engine.step import Engine

_STEP = re.compile(r"^step_(\d{8})$")
# Gathers the optimizer's state in the model's own shapes: loads at any TP, PP and DP.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 50
    """Steps between checkpoints; 0 writes only the last one."""
    keep: int = 2
    """How many of the newest stay on disk."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"checkpoint.every_steps = {self.every_steps} must be 0 or more")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep = {self.keep} must be at least 1: the newest is what a run resumes from")

    def due(self, step: int, last_step: int) -> bool:
        return step == last_step or (self.every_steps > 0 and step % self.every_steps == 0)


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = [path for path in folder.glob("step_*") if _STEP.match(path.name)] if folder.exists() else []
    return max(found, default=None)


def _sharded_state(engine: Engine, anchor: Anchor | None, is_loading: bool) -> dict[str, Any]:
    model = engine.module.sharded_state_dict()
    state: dict[str, Any] = {
        "model": model,
        "optimizer": engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA),
        "scheduler": engine.scheduler.state_dict(),
    }
    if anchor is not None:
        shards = anchor.module.sharded_state_dict(prefix="anchor.")
        average = {id(w): a for w, a in zip(anchor.module.parameters(), anchor.average, strict=True)}
        for shard in nested_values(shards):
            # In bfloat16 the forward pass's weights are roundings of the average; the average is what must survive.
            if isinstance(shard, ShardedTensor) and id(shard.data) in average:
                shard.data = average[id(shard.data)].data
                shard.dtype = shard.data.dtype
        state["anchor"] = shards
    return state


def save(folder: Path, step: int, engine: Engine, anchor: Anchor | None, state: dict[str, Any], keep: int) -> Path:
    """Collective. Write `folder/step_<step>` and drop all but the `keep` newest.

    Raises:
        OSError: the disk is too full for it (checked before a byte is written), or writing failed.
    """
    final = folder / f"step_{step:08d}"
    building = final.with_suffix(".tmp")
    needed = _num_bytes(engine, anchor)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):
            shutil.rmtree(stale)
        building.mkdir()
    free = from_main(shutil.disk_usage(folder).free if is_main() else None)
    if free < needed:
        if is_main():
            building.rmdir()
        raise OSError(
            f"a checkpoint needs about {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; free some "
            f"space or lower checkpoint.keep (now {keep})"
        )
    try:
        dist_checkpointing.save(_sharded_state(engine, anchor, is_loading=False), str(building))
    except CheckpointException as error:  # a BaseException: it would pass by every handler above
        if is_main():
            shutil.rmtree(building, ignore_errors=True)
        reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise OSError(f"checkpoint {final} could not be written ({reasons}); the one before it stays") from error
    dist.barrier()
    if is_main():
        (building / "state.json").write_text(json.dumps({**state, "step": step}, indent=2))
        if final.exists():  # a run that resumed from an older checkpoint comes by here again
            shutil.rmtree(final)
        os.rename(building, final)
        for old in sorted(path for path in folder.iterdir() if _STEP.match(path.name))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, engine: Engine, anchor: Anchor | None) -> dict[str, Any]:
    """Collective. Fill engine and anchor from a checkpoint of any layout; returns its `state.json`.

    Raises:
        ValueError: not a finished checkpoint.
    """
    if not (path / "state.json").exists():
        raise ValueError(f"{path} is not a finished checkpoint: it has no state.json")
    _prime(engine)
    loaded = dist_checkpointing.load(_sharded_state(engine, anchor, is_loading=True), str(path))
    engine.module.load_state_dict(loaded["model"])
    engine.optimizer.load_state_dict(loaded["optimizer"])
    engine.scheduler.load_state_dict(loaded["scheduler"])
    if anchor is not None:
        average = {name: a for (name, _), a in zip(anchor.module.named_parameters(), anchor.average, strict=True)}
        for name, value in loaded["anchor"].items():
            if (key := name.removeprefix("anchor.")) in average:
                average[key].copy_(value)
        anchor.publish()
    return json.loads((path / "state.json").read_text())


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


def resume(folder: Path, engine: Engine, anchor: Anchor | None, *, allowed: bool) -> int:
    """Collective. Load the newest checkpoint in `folder`, if there is one; returns how many steps are done.

    Raises:
        ValueError: there is a checkpoint and the user did not ask to resume.
    """
    newest = from_main(latest(folder) if is_main() else None)
    if newest is None:
        return 0
    if not allowed:
        raise ValueError(f"{newest} is there already: give --resume to go on from it, or another run_dir")
    return int(load(newest, engine, anchor)["step"])


def _num_bytes(engine: Engine, anchor: Anchor | None) -> int:
    """Of the whole checkpoint: weights, float32 master weights and two moments, and the anchor's float32 average."""
    weights = sum(p.numel() for p in engine.module.parameters())
    element_size = engine.config.params_dtype.itemsize
    per_rank = weights * (element_size + (12 if element_size < 4 else 8) + (4 if anchor else 0))
    model_parallel = engine.parallel.tensor * engine.parallel.pipeline
    return per_rank * model_parallel
