"""Megatron's optimizer and learning-rate schedule from our config."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_t1.engine.config import OptimConfig, ParallelConfig


def build_optimizer(
    cfg: OptimConfig,
    chunks: list[DistributedDataParallel],
    dtype: torch.dtype,
    parallel: ParallelConfig,
    total_steps: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=cfg.lr,
            min_lr=cfg.lr * cfg.min_lr_ratio,
            weight_decay=cfg.weight_decay,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            adam_beta1=cfg.adam_beta1,
            adam_beta2=cfg.adam_beta2,
            adam_eps=cfg.adam_eps,
            clip_grad=cfg.clip_grad,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
    )
    return optimizer, schedule_of(cfg, optimizer, total_steps)


def schedule_of(cfg: OptimConfig, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """It is asked before each step. The warm-up's last step (without one, the first) has the peak, and the schedule
    would end in the step after the last."""
    peak = max(cfg.warmup_steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.lr * cfg.min_lr_ratio,
        lr_warmup_steps=peak,
        lr_decay_steps=max(total_steps, peak) + 1,
        lr_decay_style=cfg.schedule,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
