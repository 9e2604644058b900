"""The T1 loss and the SFT loss: pointwise functions of per-token tensors, and their metrics.

    T1 (arXiv 2501.11651):  loss_t = -A_t logp_t - alpha H_t + beta KL_t

`logp` is the policy's logprob of the sampled token and `H` its full-vocabulary entropy, both at the sampling
temperature; `A` is the leave-one-out advantage. Both functions return one loss per token and nothing is divided
here: the engine owns the normaliser, a global token count known before the microbatches, so that no layout can
change the gradient.

KL to the anchor, with x = logp - anchor_logprob of the sampled token and `sg` a constant for the gradient:

    centered  sg(c) logp              T1. c = the sample's sum of x less the mean of the prompt's others (`algo.kl`);
                                      expected gradient that of KL(policy||anchor)
    k1        x                       unbiased value; expected on-policy gradient zero: for ablations only
    k2        x^2 / 2                 biased value; expected gradient exactly that of KL(policy||anchor)
    k3        e^-x - 1 + x            unbiased value, never negative; expected gradient that of KL(anchor||policy)
    k3_score  e^(logp - sg(logp)) k3  unbiased in value and gradient
    full      sum_v p ln(p / q)       exact, over the whole vocabulary; `kl` comes from the head

One update a batch is on policy and needs no ratio to the rollout's logprobs. For a later off-policy step, either
PPO clipping (ratio r = e^(logp - rollout_logprob), loss -min(r A, clip(r, 1 - low, 1 + high) A)) or truncated
importance sampling (loss -sg(min(r, cap)) A logp) may be switched on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_t1.algo.config import TOKEN_LOSSES, LossConfig
from megatron_t1.types import Microbatch

MAX_EXPONENT = 20.0
"""Log-ratios are cut here before exp: a token that the anchor finds e^100 times likelier must not overflow."""


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    """What the loss knows of each response token besides the policy; float32 [T], same names as in `Microbatch`."""

    advantage: Tensor
    centered_kl: Tensor
    rollout_logprob: Tensor
    anchor_logprob: Tensor

    @classmethod
    def of(cls, microbatch: Microbatch) -> TokenFields:
        return cls(**{f.name: getattr(microbatch, f.name) for f in fields(cls)})

    def __getitem__(self, part: slice) -> TokenFields:
        return TokenFields(**{f.name: getattr(self, f.name)[part] for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Detached scalars over tokens. Between chunks, microbatches and ranks `sums` add up and `maxima` take the max."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def merge(parts: Iterable[Metrics]) -> Metrics:
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        for part in parts:
            for name, value in part.sums.items():
                sums[name] = sums[name] + value if name in sums else value
            for name, value in part.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        return Metrics(sums=sums, maxima=maxima)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def _max(x: Tensor) -> Tensor:
    return x.amax() if x.numel() else x.new_zeros(())


@TOKEN_LOSSES.add("t1")
def t1_token_loss(
    logprob: Tensor, entropy: Tensor, tokens: TokenFields, kl: Tensor | None = None, *, cfg: LossConfig
) -> tuple[Tensor, Metrics]:
    """Per-token T1 loss.

    Args:
        logprob, entropy: float32 [T], with gradients.
        tokens: the constants of the same T tokens.
        kl: float32 [T], full-vocabulary KL(policy||anchor) with gradient, for `kl_estimator="full"`.

    Returns:
        loss float32 [T], and sums over tokens of: `entropy`, `logprob`, `pg_loss`, with an anchor `kl_loss`
        (unweighted), `kl_k1` and `kl_k3`, `ratio` policy/rollout, `logprob_diff` and `prob_diff` (absolute, policy
        against rollout), `clip_fraction` (tokens whose gradient the clipping stopped or TIS cut), `num_tokens`; maxima
        of `ratio`, `logprob_diff`, `prob_diff`, all >= 0.

    Raises:
        ValueError: `kl_estimator="full"` without `kl`.
    """
    log_ratio = logprob - tokens.rollout_logprob
    ratio = _exp(log_ratio)
    clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
    if cfg.clips:
        low = 1.0 - cfg.clip_ratio_low if cfg.clip_ratio_low is not None else None
        high = 1.0 + cfg.clip_ratio_high if cfg.clip_ratio_high is not None else None
        free, bounded = ratio * tokens.advantage, ratio.clamp(low, high) * tokens.advantage
        pg_loss = -torch.minimum(free, bounded)
        clipped = bounded < free
    elif cfg.tis_cap is not None:
        pg_loss = -ratio.detach().clamp(max=cfg.tis_cap) * tokens.advantage * logprob
        clipped = ratio > cfg.tis_cap
    else:
        pg_loss = -tokens.advantage * logprob

    loss = pg_loss - cfg.entropy_coef * entropy
    to_anchor: dict[str, Tensor] = {}
    if cfg.kl_coef:
        k1 = logprob - tokens.anchor_logprob
        k3 = _exp(-k1) - 1 + k1
        match cfg.kl_estimator:
            case "centered":
                kl_loss = tokens.centered_kl * logprob
            case "k1":
                kl_loss = k1
            case "k2":
                kl_loss = 0.5 * k1.square()
            case "k3":
                kl_loss = k3
            case "k3_score":
                kl_loss = (logprob - logprob.detach()).exp() * k3
            case "full":
                if kl is None:
                    raise ValueError('loss.kl_estimator = "full" needs a full-vocabulary KL: give the head the anchor')
                kl_loss = kl
        loss = loss + cfg.kl_coef * kl_loss
        to_anchor = {"kl_loss": kl_loss, "kl_k1": k1, "kl_k3": k3}

    with torch.no_grad():
        logprob_diff = log_ratio.abs()
        prob_diff = (logprob.exp() - tokens.rollout_logprob.exp()).abs()
        sums = {
            "entropy": entropy,
            "logprob": logprob,
            "pg_loss": pg_loss,
            **to_anchor,
            "ratio": ratio,
            "logprob_diff": logprob_diff,
            "prob_diff": prob_diff,
            "clip_fraction": clipped.float(),
            "num_tokens": torch.ones_like(logprob),
        }
        maxima = {"ratio": ratio, "logprob_diff": logprob_diff, "prob_diff": prob_diff}
        return loss, Metrics(
            sums={name: value.sum() for name, value in sums.items()},
            maxima={name: _max(value) for name, value in maxima.items()},
        )


def sft_token_loss(logprob: Tensor, entropy: Tensor, tokens: TokenFields) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood [T]; sums `nll`, `entropy`, `num_tokens`, maximum `nll`. `tokens` is not read."""
    loss = -logprob
    with torch.no_grad():
        sums = {"nll": loss.sum(), "entropy": entropy.sum(), "num_tokens": loss.new_full((), loss.numel())}
        return loss, Metrics(sums=sums, maxima={"nll": _max(loss)})
