"""Process groups: torch.distributed and Megatron's parallel state, set up once a process."""

from __future__ import annotations

import datetime
import math
import os
import random
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_t1.models.ops import Shard, Shards
from megatron_t1.platform import Platform

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the trainer's processes share the model and the data. Data parallelism is what is left of the world."""

    nproc_per_node: int = 0
    """Trainer processes on this machine when `t1` starts them itself (0: one a GPU; on a CPU as few as the layout
    takes). Ignored under torchrun or srun, which have started them already."""
    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size (stages)."""
    virtual_pipeline: int = 1
    """Chunks of the model that each stage holds, for the interleaved schedule; 1 is the plain one."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each of the pipeline x virtual_pipeline chunks in the model's order; empty spreads them evenly, and
    what is left over to the middle first: the first chunk has the embedding too, the last one the head."""
    expert: int = 1
    """Expert-parallel size: the experts of a layer are spread over so many ranks, which for everything else are
    data-parallel ones (or tensor-parallel ones, as far as expert_tensor < tensor)."""
    expert_tensor: int = 0
    """Tensor-parallel size inside an expert; 0 is that of the rest."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor-parallel group too; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks bucket by bucket during the last backward, not after it."""
    max_tokens_per_microbatch: int = 16384
    """Packing limit: tokens in one forward pass of one data-parallel rank, prompts and padding included."""
    timeout_s: float = 21600.0
    """Deadline of a collective within the trainer. The other ranks wait in one while rank 0 generates or evaluates: it
    must exceed the longest of these. (A rank that dies is noticed at once.)"""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "max_tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} = {getattr(self, name)} must be at least 1")
        for name in ("nproc_per_node", "expert_tensor"):
            if getattr(self, name) < 0:
                raise ValueError(f"parallel.{name} = {getattr(self, name)} must be 0 or more")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1")
        if self.pipeline_layers and (
            len(self.pipeline_layers) != self.num_stages or min(self.pipeline_layers, default=0) < 1
        ):
            raise ValueError(
                f"parallel.pipeline_layers = {list(self.pipeline_layers)} must be {self.num_stages} numbers above 0: "
                f"one for each of pipeline x virtual_pipeline = {self.pipeline} x {self.virtual_pipeline} chunks"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("parallel.sequence_parallel = true needs parallel.tensor > 1; turn it off")
        if self.timeout_s <= 0:
            raise ValueError(f"parallel.timeout_s = {self.timeout_s} must be positive")

    @property
    def num_stages(self) -> int:
        """Chunks that the layers are cut into, over all ranks of a pipeline."""
        return self.pipeline * self.virtual_pipeline

    @property
    def num_ranks(self) -> int:
        """The fewest processes that this layout takes."""
        return self.pipeline * math.lcm(self.tensor, (self.expert_tensor or self.tensor) * self.expert)

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each chunk, in the model's order. Raises ValueError when they can't be cut so."""
        if self.pipeline_layers:
            if sum(self.pipeline_layers) != num_layers:
                raise ValueError(
                    f"parallel.pipeline_layers = {list(self.pipeline_layers)} are {sum(self.pipeline_layers)} layers, "
                    f"the model has {num_layers}"
                )
            return self.pipeline_layers
        each, left = divmod(num_layers, self.num_stages)
        if each == 0:
            raise ValueError(
                f"{num_layers} layers are too few for parallel.pipeline x parallel.virtual_pipeline = "
                f"{self.pipeline} x {self.virtual_pipeline} chunks"
            )
        last = self.num_stages - 1
        roomiest = sorted(range(self.num_stages), key=lambda stage: (stage == last, stage == 0))[:left]
        return tuple(each + (stage in roomiest) for stage in range(self.num_stages))

    def check_fits(self, num_tokens: int) -> None:
        """Raise ValueError, before any step, when the longest sequence of a run has no room in a microbatch."""
        multiple = 16 * self.tensor  # what a microbatch's length may be rounded down to (FP8)
        if num_tokens > self.max_tokens_per_microbatch // multiple * multiple:
            raise ValueError(
                f"the longest sequence has up to {num_tokens} tokens and does not fit into a microbatch of "
                f"{self.max_tokens_per_microbatch}; raise parallel.max_tokens_per_microbatch"
            )


def initialize(cfg: ParallelConfig, platform: Platform, seed: int) -> None:
    """Join the process group (from torchrun's environment, or alone) and build Megatron's groups. Idempotent.

    Raises:
        ValueError: the world does not divide by tensor x pipeline, or by that of the experts.
    """
    if mpu.model_parallel_is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    world = int(os.environ["WORLD_SIZE"])
    expert_tensor = cfg.expert_tensor or cfg.tensor
    for names, size in (
        ("parallel.tensor", cfg.tensor),
        ("parallel.expert_tensor x parallel.expert", expert_tensor * cfg.expert),
    ):
        if world % (size * cfg.pipeline):
            raise ValueError(
                f"{world} trainer processes do not divide by {names} x parallel.pipeline = {size} x {cfg.pipeline}; "
                f"start a multiple of {size * cfg.pipeline}"
            )
    timeout = datetime.timedelta(seconds=cfg.timeout_s)
    # Both backends in one group: control messages and exports travel as CPU tensors, training as the device's.
    backend = "gloo" if platform.backend == "gloo" else "cpu:gloo,cuda:nccl"
    if dist.is_initialized():
        pass  # the caller has joined, or had other model-parallel groups before
    elif "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=cfg.tensor,
        pipeline_model_parallel_size=cfg.pipeline,
        virtual_pipeline_model_parallel_size=cfg.virtual_pipeline if cfg.virtual_pipeline > 1 else None,
        expert_model_parallel_size=cfg.expert,
        expert_tensor_parallel_size=expert_tensor,
        distributed_timeout_minutes=max(1, round(cfg.timeout_s / 60)),
    )
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed every generator; data-parallel replicas alike, model-parallel ranks as Megatron asks."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shards() -> Shards:
    """This rank's place in the groups that cut weights."""
    return Shards(
        tensor=Shard(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        expert=Shard(mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
        expert_tensor=Shard(mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()),
    )


def is_main() -> bool:
    """Rank 0 drives the servers and writes every file that is not a sharded checkpoint."""
    return dist.get_rank() == 0


def from_main(value: T | None) -> T:
    """Rank 0's value on every rank. Objects of our own processes only: never what a server or a file said unchecked."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
