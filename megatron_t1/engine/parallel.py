"""Process groups: torch.distributed and Megatron's parallel state, set up once a process."""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_t1.platform import Platform
from megatron_t1.weights.ops import Shard, Shards

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the trainer's processes share the model and the data. Data parallelism is what is left of the world."""

    nproc_per_node: int = 0
    """Trainer processes on this machine when `t1` starts them itself (0: one a GPU, or one on a CPU). Ignored under
    torchrun or srun, which have started them already."""
    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size (stages)."""
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
        for name in ("tensor", "pipeline", "max_tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} = {getattr(self, name)} must be at least 1")
        if self.nproc_per_node < 0:
            raise ValueError(f"parallel.nproc_per_node = {self.nproc_per_node} must be 0 or more")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("parallel.sequence_parallel = true needs parallel.tensor > 1; turn it off")
        if self.timeout_s <= 0:
            raise ValueError(f"parallel.timeout_s = {self.timeout_s} must be positive")

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
        ValueError: the world does not divide by tensor x pipeline.
    """
    if mpu.model_parallel_is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    world = int(os.environ["WORLD_SIZE"])
    if world % (cfg.tensor * cfg.pipeline):
        raise ValueError(
            f"{world} trainer processes do not divide by parallel.tensor x parallel.pipeline = "
            f"{cfg.tensor} x {cfg.pipeline}; start a multiple of {cfg.tensor * cfg.pipeline}"
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
