"""What a user says about the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from megatron_t1.fields import FieldError, known
from megatron_t1.plugins import Registry

CHUNK_LOGITS = {"cpu": 75 * 2**20, "cuda": 320 * 2**20}
"""Logits that the fused head holds at a time in its 3 G path, by device: a chunk of tokens over all rows of this rank,
300 MiB and 1.25 GiB."""
KlEstimator = Literal["centered", "k1", "k2", "k3", "k3_score", "full"]
KlBaseline = Literal["prompt", "batch", "none"]

TOKEN_LOSSES: Registry[Callable[..., tuple[Any, Any]]] = Registry("token loss", home="megatron_t1.algo.loss")
"""Functions as `loss.t1_token_loss`, the built-in one."""
ADVANTAGES: Registry[Callable[[np.ndarray], np.ndarray]] = Registry("advantage", home="megatron_t1.algo.advantage")
"""Rewards of a prompt's samples, float [K] -> what weights their tokens, float64 [K]."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Coefficients of the T1 loss."""

    token_loss: str = "t1"
    """The loss of a token; others come from `plugins`."""
    advantage: str = "leave_one_out"
    """What the rewards of a prompt's samples make of each other; others come from `plugins`."""

    entropy_coef: float = 1e-3
    """alpha, the weight of the token entropy bonus; our choice, no published value is known to us."""
    kl_coef: float = 2e-4
    """beta, the weight of the KL to the anchor; at 0 there is no anchor."""
    kl_estimator: KlEstimator = "centered"
    """How KL is estimated: centered (T1), k1, k2, k3, k3_score, or full (over the whole vocabulary)."""
    kl_baseline: KlBaseline = "prompt"
    """What `centered` takes from a sample's KL: the mean of the prompt's other samples (T1), of all others of the
    batch, or none (the plain KL in the reward)."""
    clip_ratio_low: float | None = None
    """PPO clipping below 1 - clip_ratio_low; null switches it off."""
    clip_ratio_high: float | None = None
    """PPO clipping above 1 + clip_ratio_high; null switches it off."""
    tis_cap: float | None = None
    """Truncated importance sampling: each token weighted by policy/rollout, cut at this value; null switches it off."""

    def __post_init__(self) -> None:
        known(self, "token_loss", TOKEN_LOSSES, self.token_loss, also=["t1"])  # those of torch stay unread here
        known(self, "advantage", ADVANTAGES, self.advantage, also=["leave_one_out"])
        for name in ("entropy_coef", "kl_coef"):
            if getattr(self, name) < 0:
                raise FieldError(name, getattr(self, name), "must be 0 or more; 0 switches the term off")
        for name in ("clip_ratio_low", "clip_ratio_high", "tis_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FieldError(name, value, "must be above 0; null switches it off")
        for name, choices in (("kl_estimator", get_args(KlEstimator)), ("kl_baseline", get_args(KlBaseline))):
            if getattr(self, name) not in choices:
                raise FieldError(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        if self.kl_baseline != "prompt" and self.kl_estimator != "centered":
            raise FieldError("kl_baseline", self.kl_baseline, "needs loss.kl_estimator = centered; leave it out")
        if self.clips and self.tis_cap is not None:
            raise FieldError(
                "tis_cap",
                self.tis_cap,
                f"and loss.clip_ratio_low/high = {self.clip_ratio_low}/{self.clip_ratio_high} would both weight by "
                "policy/rollout; set one of them to null",
            )

    @property
    def clips(self) -> bool:
        return self.clip_ratio_low is not None or self.clip_ratio_high is not None
