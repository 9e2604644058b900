"""Megatron's optimizer and learning-rate schedule from our config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_t1.engine.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. The paper: SFT at 1e-5 with a cosine, RL at 1.5e-6 constant."""

    lr: float
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes on after the warm-up."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this share of `lr`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"optim.lr = {self.lr} must not be negative")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio = {self.min_lr_ratio} must lie in [0, 1]: it is a share of lr")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps = {self.warmup_steps} must be 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} = {getattr(self, name)} must lie in [0, 1)")


def build_optimizer(
    cfg: OptimConfig,
    chunks: list[DistributedDataParallel],
    dtype: torch.dtype,
    parallel: ParallelConfig,
    total_steps: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    if total_steps <= cfg.warmup_steps and cfg.schedule != "constant":
        raise ValueError(
            f"optim.warmup_steps = {cfg.warmup_steps} leaves nothing of the {total_steps} steps for the {cfg.schedule} "
            "schedule; lower it"
        )
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
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.lr * cfg.min_lr_ratio,
        lr_warmup_steps=cfg.warmup_steps,
        lr_decay_steps=max(total_steps, cfg.warmup_steps + 1),
        lr_decay_style=cfg.schedule,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
