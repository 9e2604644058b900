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

Samples that are not of the policy pi that trains (`rl.lag`, servers of another precision) are of a mu, whose logprob of
each token, under the very weights that chose it, came with it: `rollout_logprob`. One optimizer step a batch leaves no
third distribution; what papers call the old policy is mu. With the ratios

    r_t = pi(y_t) / mu(y_t),   s = prod_t r_t over the sample,   g = s^(1 / number of its tokens)

and bounds [a, b] from loss.ratio_min and ratio_max, or mask_min and mask_max, every correction is a weight, constant
for the gradient, on what rests on the token's having been sampled. With S_t = A_t - beta c_t

    loss_t = -w_t m_t S_t logp_t - alpha H_t,   and beta w_t m_t k_t for the k1 to k3_score above

    importance  w_t                  bias, and source
    none        1                    first order in pi - mu, and a baseline does not drop out (`algo.advantage`)
    token       clip(r_t, a, b)      unbounded: each token's own expectation is exact, what stands before and after it
                                     stays of mu; bounds add that of the ratios cut. Truncated importance sampling has
                                     b alone (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
                                     RL Training", 2025); CISPO (arXiv 2506.13585) is the same formula
    sequence    clip(s, a, b)        unbounded: none where mu covers pi, but a variance exponential in the length;
                                     bounds trade it for the bias of the ratios cut (verl's rollout correction)
    ppo         r_t; 0 where         that of `token`, and that of the tokens stopped. Gradient of
                clip(r_t, a, b) S_t  -min(r_t S_t, clip(r_t, a, b) S_t) (arXiv 1707.06347; bounds unlike each other:
                < r_t S_t            DAPO, arXiv 2503.14476)
    gspo        g; 0 where           that of `ppo`, and that g is no ratio of densities. Gradient of
                clip(g, a, b) S_t    -min(g S, clip(g, a, b) S) x number of tokens (arXiv 2507.18071, where a sample
                < g S_t              counts once; here, as in all of T1's loss, once a token)

    mask        m_t = 1 only where   bias: what the dropped would have taught; source
    token       a <= r_t <= b        IcePop, with importance = token unbounded (Ling team, arXiv 2510.18855)
    sequence    a <= s <= b          drops whole samples, long ones first (verl)
    geometric   a <= g <= b          drops whole samples, whatever their length (verl, prime-rl)

Entropy and `full` KL are expectations over the vocabulary, in which no token was sampled: they keep weight 1, also
where m_t = 0. Their bias: the places they are taken at are those that mu visits. What top_p, top_k or min_p kept a
server from sampling is in no sample, and no weight brings it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from megatron_t1.algo.config import MAX_EXPONENT, TOKEN_LOSSES, LossConfig
from megatron_t1.fields import FieldError
from megatron_t1.types import Microbatch

_RATIO_OF = {"token": "token", "sequence": "sequence", "ppo": "token", "gspo": "geometric"}


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    """What the loss knows of each response token besides the policy; float32 [T], same names as in `Microbatch`."""

    advantage: Tensor
    centered_kl: Tensor
    rollout_logprob: Tensor
    anchor_logprob: Tensor
    sequence_log_ratio: Tensor
    geometric_log_ratio: Tensor

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
        loss float32 [T], and sums over tokens of: `entropy`, `logprob`, `pg_loss`, with an anchor `kl_loss` (without
        beta), `kl_k1` and `kl_k3`, `ratio` policy/rollout, `logprob_diff` and `prob_diff` (absolute, policy against
        rollout), `kl_behaviour` (r - 1 - ln r, whose mean over samples of mu is KL(mu||policy) a token); where cfg
        corrects also `weight` and `weight_squared`, `clip_fraction` (tokens that `importance` cut or
        stopped) and `masked`; maxima of `ratio`, `logprob_diff`, `prob_diff`, all >= 0.

    Raises:
        ValueError: `kl_estimator="full"` without `kl`.
    """
    log_ratio = logprob - tokens.rollout_logprob
    ratio = _exp(log_ratio)
    score = tokens.advantage - cfg.kl_coef * tokens.centered_kl if cfg.centers else tokens.advantage
    weight, correction = _weight(log_ratio.detach(), score, tokens, cfg)
    pg_loss = -weight * tokens.advantage * logprob
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
        if cfg.kl_estimator != "full":
            kl_loss = weight * kl_loss
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
            "kl_behaviour": log_ratio.clamp(max=MAX_EXPONENT).expm1() - log_ratio,
            **correction,
        }
        maxima = {"ratio": ratio, "logprob_diff": logprob_diff, "prob_diff": prob_diff}
        return loss, Metrics(
            sums={name: value.sum() for name, value in sums.items()},
            maxima={name: _max(value) for name, value in maxima.items()},
        )


def _weight(log_ratio: Tensor, score: Tensor, tokens: TokenFields, cfg: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """w m of each token, and its metrics where cfg corrects anything."""
    weight = torch.ones_like(log_ratio)
    cut = masked = torch.zeros_like(log_ratio, dtype=torch.bool)
    ratios = {"token": log_ratio, "sequence": tokens.sequence_log_ratio, "geometric": tokens.geometric_log_ratio}
    if cfg.importance != "none":
        weight = _exp(ratios[_RATIO_OF[cfg.importance]])
        bounded = weight.clamp(cfg.ratio_min or 0.0, cfg.ratio_max)
        if cfg.importance in ("ppo", "gspo"):
            cut = bounded * score < weight * score
            weight = weight.masked_fill(cut, 0.0)
        else:
            cut = bounded != weight
            weight = bounded
    if cfg.mask != "none":
        ratio = _exp(ratios[cfg.mask])
        masked = ratio.clamp(cfg.mask_min or 0.0, cfg.mask_max) != ratio
        weight = weight.masked_fill(masked, 0.0)
    if cfg.importance == cfg.mask == "none":
        return weight, {}
    return weight, {"weight": weight, "weight_squared": weight.square(), "clip_fraction": cut, "masked": masked}


def sft_token_loss(logprob: Tensor, entropy: Tensor, tokens: TokenFields) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood [T]; sums `nll`, `entropy`, maximum `nll`. `tokens` is not read."""
    loss = -logprob
    with torch.no_grad():
        return loss, Metrics(sums={"nll": loss.sum(), "entropy": entropy.sum()}, maxima={"nll": _max(loss)})


def token_loss_of(cfg: LossConfig) -> Callable[..., tuple[Tensor, Metrics]]:
    """The configured loss of a token, tried out.

    Raises:
        FieldError: its metrics lack what every step is held to.
    """
    loss = partial(TOKEN_LOSSES[cfg.token_loss], cfg=cfg)
    none = torch.zeros(0)
    _, metrics = loss(none, none, TokenFields(**dict.fromkeys((f.name for f in fields(TokenFields)), none)), none)
    if "logprob_diff" not in metrics.sums:
        raise FieldError(
            "loss.token_loss",
            cfg.token_loss,
            "returns Metrics without the sum `logprob_diff`, |policy's - servers' logprob| of its tokens, to which "
            "rl.max_logprob_diff is held: add it, or go on from the metrics of t1_token_loss",
        )
    return loss
