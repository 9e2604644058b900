"""Process groups: torch.distributed and Megatron's parallel state, set up once a process."""

from __future__ import annotations

import datetime
import os
import random
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_t1.engine.config import ParallelConfig
from megatron_t1.engine.layout import check_world
from megatron_t1.models.weight_map import Shard, Shards
from megatron_t1.platform.detect import Platform

T = TypeVar("T")
_NCCL_TIMEOUT_S = 1800.0


def initialize(cfg: ParallelConfig, platform: Platform, seed: int) -> None:
    """Join the process group (from torchrun's environment, or alone) and build Megatron's groups. Idempotent.

    Raises:
        ValueError: the world does not divide by tensor x context x pipeline, or by that of the experts.
    """
    if mpu.model_parallel_is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    check_world(cfg, int(os.environ["WORLD_SIZE"]))
    timeout = datetime.timedelta(seconds=cfg.timeout_s)
    # Both backends in one group: control messages and exports travel as CPU tensors, training as the device's.
    backend = "gloo" if platform.backend == "gloo" else "cpu:gloo,cuda:nccl"
    if dist.is_initialized():
        pass  # the caller has joined, or had other model-parallel groups before
    elif int(os.environ["WORLD_SIZE"]) == 1:  # whatever MASTER_ADDR says, that a job script has exported
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    # While rank 0 generates, the others wait in the default group's gloo half: NCCL need not hold 32 GPUs for as long.
    timeout_s = min(cfg.timeout_s, _NCCL_TIMEOUT_S) if platform.backend == "nccl" else cfg.timeout_s
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=cfg.tensor,
        pipeline_model_parallel_size=cfg.pipeline,
        context_parallel_size=cfg.context,
        virtual_pipeline_model_parallel_size=cfg.virtual_pipeline if cfg.virtual_pipeline > 1 else None,
        expert_model_parallel_size=cfg.expert,
        expert_tensor_parallel_size=cfg.expert_tensor or cfg.tensor,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
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
