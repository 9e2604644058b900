"""What a user says about the loss."""

from __future__ import annotations

import math
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
Importance = Literal["none", "token", "sequence", "ppo", "gspo"]
Mask = Literal["none", "token", "sequence", "geometric"]

TOKEN_LOSSES: Registry[Callable[..., tuple[Any, Any]]] = Registry("token loss", home="megatron_t1.algo.loss")
"""Functions as `loss.t1_token_loss`, the built-in one."""
ADVANTAGES: Registry[Callable[[np.ndarray], np.ndarray]] = Registry("advantage", home="megatron_t1.algo.advantage")
"""Rewards of a prompt's samples, float [K] -> what weights their tokens, float64 [K]."""


MAX_EXPONENT = 20.0
"""Log-ratios are cut here before exp: a token that the anchor finds e^100 times likelier must not overflow."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Coefficients of the T1 loss."""

    token_loss: str = "t1"
    """The loss of a token; others come from `plugins`."""
    advantage: str = "leave_one_out"
    """What the rewards of a prompt's samples make of each other: leave_one_out (T1) or grpo (their mean and standard
    deviation); others come from `plugins`."""

    entropy_coef: float = 1e-3
    """alpha, the weight of the token entropy bonus; our choice, no published value is known to us."""
    kl_coef: float = 2e-4
    """beta, the weight of the KL to the anchor; at 0 there is no anchor."""
    kl_estimator: KlEstimator = "centered"
    """How KL is estimated: centered (T1), k1, k2, k3, k3_score, or full (over the whole vocabulary)."""
    kl_baseline: KlBaseline = "prompt"
    """What `centered` takes from a sample's KL: the mean of the prompt's other samples (T1), of all others of the
    batch, or none (the plain KL in the reward)."""
    importance: Importance = "none"
    """How samples of other weights are weighted, by the ratio policy/servers of their tokens: none (as the policy's
    own), token (truncated importance sampling, CISPO), sequence (the same by the product over a sample), ppo (its
    clip), or gspo (the clip of the geometric mean over a sample)."""
    ratio_min: float | None = None
    """Lower bound of the ratio in `importance`, at most 1; null: none."""
    ratio_max: float | None = None
    """Upper bound of the ratio in `importance`, at least 1; null: none."""
    mask: Mask = "none"
    """Which ratio outside of its bounds drops tokens from the gradient: none, their own (token; IcePop), or their
    sample's, as product over its tokens (sequence) or geometric mean (geometric)."""
    mask_min: float | None = None
    """Lower bound of the ratio in `mask`, at most 1; null: none."""
    mask_max: float | None = None
    """Upper bound of the ratio in `mask`, at least 1; null: none."""

    def __post_init__(self) -> None:
        known(self, "token_loss", TOKEN_LOSSES, self.token_loss, also=["t1"])  # those of torch stay unread here
        known(self, "advantage", ADVANTAGES, self.advantage, also=["leave_one_out", "grpo"])
        for name in ("entropy_coef", "kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FieldError(name, getattr(self, name), "must be 0 or more; 0 switches the term off")
        literals = {"kl_estimator": KlEstimator, "kl_baseline": KlBaseline, "importance": Importance, "mask": Mask}
        for name, choices in literals.items():
            if getattr(self, name) not in get_args(choices):
                raise FieldError(name, getattr(self, name), f"must be one of {', '.join(get_args(choices))}")
        for name, usual in (("kl_estimator", "centered"), ("kl_baseline", "prompt")):
            if self.kl_coef == 0 and getattr(self, name) != usual:
                raise FieldError(name, getattr(self, name), "is not read with loss.kl_coef = 0; leave it out")
        if self.kl_baseline != "prompt" and self.kl_estimator != "centered":
            raise FieldError("kl_baseline", self.kl_baseline, "needs loss.kl_estimator = centered; leave it out")
        clips = self.importance in ("ppo", "gspo")
        usual = "PPO's are 0.8 and 1.2, GSPO's 0.9997 and 1.0004"
        _check_bounds(self, "importance", ("ratio_min", "ratio_max"), clips, usual)
        _check_bounds(self, "mask", ("mask_min", "mask_max"), self.mask != "none", "IcePop's by token are 0.5 and 5")

    @property
    def centers(self) -> bool:
        return self.kl_coef > 0 and self.kl_estimator == "centered"

    @property
    def scores_policy(self) -> bool:
        """Whether the policy must score the samples before the first backward: where a sum over a sample's tokens is a
        constant of the loss."""
        return self.centers or self.importance in ("sequence", "gspo") or self.mask in ("sequence", "geometric")


def _check_bounds(cfg: LossConfig, method: str, bounds: tuple[str, str], needed: bool, usual: str) -> None:
    (low, least), (high, most) = ((name, getattr(cfg, name)) for name in bounds)
    for name, value in ((low, least), (high, most)):
        if value is not None and getattr(cfg, method) == "none":
            raise FieldError(name, value, f"is not read with loss.{method} = none; choose a method, or leave this out")
    if least is not None and not 0 <= least <= 1:
        raise FieldError(low, least, "must lie in [0, 1], as the ratio is 1 on policy; null: no bound")
    if most is not None and not most >= 1:
        raise FieldError(high, most, "must be at least 1, as the ratio is 1 on policy; null: no bound")
    for name, value in ((low, least), (high, most)):
        if value and abs(math.log(value)) >= MAX_EXPONENT:
            raise FieldError(name, value, f"lies beyond e^{MAX_EXPONENT:g}, where ratios are cut; null: no bound")
    if needed and least is None and most is None:
        raise FieldError(method, getattr(cfg, method), f"needs loss.{low} or loss.{high}: {usual}")
