"""Corrections for samples of another policy: their formulas in float64, and what they expect over all possible samples.

The references are the published objectives, differentiated by autograd: PPO's and GSPO's with min and clip, weights
with their stopped ratio, all for S = A - beta c.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_t1.algo.advantage import leave_one_out
from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.kl import centered
from megatron_t1.algo.loss import Metrics, TokenFields, t1_token_loss

LENGTHS = (1, 9, 4, 30, 2, 12)
BETA = 0.3
IMPORTANCE = {
    "none": {},
    "token unbounded": {"importance": "token"},
    "token": {"importance": "token", "ratio_max": 1.5},
    "token, both bounds": {"importance": "token", "ratio_min": 0.7, "ratio_max": 1.5},
    "sequence": {"importance": "sequence", "ratio_min": 0.5, "ratio_max": 2.0},
    "ppo": {"importance": "ppo", "ratio_min": 0.8, "ratio_max": 1.28},
    "ppo, bound above": {"importance": "ppo", "ratio_max": 1.28},
    "gspo": {"importance": "gspo", "ratio_min": 0.95, "ratio_max": 1.05},
}
MASK = {
    "none": {},
    "token": {"mask": "token", "mask_min": 0.5, "mask_max": 1.8},
    "token below": {"mask": "token", "mask_min": 0.5},
    "sequence": {"mask": "sequence", "mask_min": 0.4, "mask_max": 2.5},
    "geometric": {"mask": "geometric", "mask_min": 0.9, "mask_max": 1.07},
}


def batch():
    """Samples in float64: logprobs of the policy, of mu and of the anchor a token, A and c a sample."""
    g = torch.Generator().manual_seed(3)
    samples = []
    for length in LENGTHS:
        logprob, shift, anchor = (torch.randn(length, generator=g, dtype=torch.float64) for _ in range(3))
        advantage, c = torch.randn(2, generator=g, dtype=torch.float64).tolist()
        samples.append((logprob - 3, logprob - 3 - 0.4 * shift, anchor - 3, advantage, c))
    return samples


def ours(samples, cfg, dtype=torch.float32, parts=1):
    """(loss, gradient, metrics) of the samples one after the other, as the head asks: chunk by chunk."""
    lengths = torch.tensor([len(logprob) for logprob, *_ in samples])
    logprob, mu, anchor = (torch.cat([sample[i] for sample in samples]).to(dtype) for i in range(3))
    sums = torch.tensor([(sample[0] - sample[1]).sum() for sample in samples])
    tokens = TokenFields(
        advantage=torch.tensor([sample[3] for sample in samples]).repeat_interleave(lengths).to(dtype),
        centered_kl=torch.tensor([sample[4] for sample in samples]).repeat_interleave(lengths).to(dtype),
        rollout_logprob=mu,
        anchor_logprob=anchor,
        sequence_log_ratio=sums.repeat_interleave(lengths).to(dtype),
        geometric_log_ratio=(sums / lengths).repeat_interleave(lengths).to(dtype),
    )
    logprob.requires_grad_()
    losses, metrics = [], []
    for index in torch.arange(len(logprob)).chunk(parts):
        part = slice(int(index[0]), int(index[-1]) + 1)
        loss, found = t1_token_loss(logprob[part], torch.zeros(len(index), dtype=dtype), tokens[part], cfg=cfg)
        losses.append(loss)
        metrics.append(found)
    loss = torch.cat(losses)
    (grad,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.detach(), grad, Metrics.merge(metrics)


def reference(samples, cfg):
    """Gradient by the published objectives, and the weight of each token, whether it was cut, whether dropped."""
    low, high = cfg.ratio_min or 0.0, np.inf if cfg.ratio_max is None else cfg.ratio_max
    least, most = cfg.mask_min or 0.0, np.inf if cfg.mask_max is None else cfg.mask_max
    grads, weights, cuts, drops = [], [], [], []
    for logprob, mu, anchor, advantage, c in samples:
        logp = logprob.clone().requires_grad_()
        score = advantage - BETA * c if cfg.kl_estimator == "centered" else advantage
        r, s, g = ((logp - mu).exp(), (logp - mu).sum().exp(), (logp - mu).mean().exp())
        ones = torch.ones_like(mu)
        ratio = {"none": ones, "token": r, "ppo": r, "sequence": s * ones, "gspo": g * ones}[cfg.importance].detach()
        outside = (ratio < low) | (ratio > high)
        match cfg.importance:
            case "ppo":
                objective = -torch.minimum(r * score, r.clamp(low, high) * score).sum()
            case "gspo":
                objective = -len(mu) * torch.minimum(g * score, g.clamp(low, high) * score)
            case _:
                objective = -(ratio.clamp(low, high) * score * logp).sum()
        (grad,) = torch.autograd.grad(objective, logp)
        cut = grad == 0 if cfg.importance in ("ppo", "gspo") else outside
        weight = torch.where(cut, 0.0, ratio) if cfg.importance in ("ppo", "gspo") else ratio.clamp(low, high)
        judged = {"none": ones, "token": r, "sequence": s * ones, "geometric": g * ones}[cfg.mask].detach()
        kept = (judged >= least) & (judged <= most)
        x = logp - anchor
        k = {"k1": x, "k2": x.square() / 2, "k3": (-x).exp() - 1 + x}.get(cfg.kl_estimator)
        if cfg.kl_estimator == "k3_score":
            k = (logp - logp.detach()).exp() * ((-x).exp() - 1 + x)
        if k is not None:
            grad = grad + torch.autograd.grad((BETA * weight * k).sum(), logp)[0]
        grads.append(torch.where(kept, grad, 0.0))
        weights.append(torch.where(kept, weight, 0.0))
        cuts.append(cut)
        drops.append(~kept)
    return tuple(torch.cat(parts) for parts in (grads, weights, cuts, drops))


CASES = [(i, m, "centered") for i in IMPORTANCE for m in MASK] + [
    (i, "token", k) for i in ("token", "ppo", "sequence") for k in ("k1", "k2", "k3", "k3_score")
]


@pytest.mark.parametrize(("importance", "mask", "estimator"), CASES)
def test_gradient_and_metrics_are_those_of_the_published_objective(importance, mask, estimator):
    given = {**IMPORTANCE[importance], **MASK[mask]}
    cfg = LossConfig(entropy_coef=0.0, kl_coef=BETA, kl_estimator=estimator, **given)
    samples = batch()
    grad, weight, cut, dropped = reference(samples, cfg)
    loss, got, metrics = ours(samples, cfg)
    torch.testing.assert_close(got.double(), grad, rtol=2e-6, atol=2e-6)
    in_chunks = ours(samples, cfg, parts=5)
    assert torch.equal(in_chunks[0], loss)
    assert torch.equal(in_chunks[1], got)
    ratio = torch.cat([sample[0] - sample[1] for sample in samples]).exp()
    wanted = {"kl_behaviour": ratio - 1 - ratio.log(), "ratio": ratio}
    if given:
        wanted |= {"weight": weight, "weight_squared": weight**2, "clip_fraction": cut, "masked": dropped}
        assert 0 < dropped.sum() < len(dropped) or mask == "none", "the case drops some and keeps some"
        assert 0 < cut.sum() < len(cut) or importance in ("none", "token unbounded"), "the case cuts some"
    for name, values in wanted.items():
        for found in (metrics, in_chunks[2]):
            assert float(found.sums[name]) == pytest.approx(float(values.sum()), rel=1e-5), name
    assert given or "weight" not in metrics.sums
    if estimator == "centered":
        score = torch.cat([torch.full_like(mu, a - BETA * c) for _, mu, _, a, c in samples])
        logprob = torch.cat([sample[0] for sample in samples])
        torch.testing.assert_close(loss.double(), -weight * score * logprob, rtol=2e-6, atol=2e-6)


def test_full_kl_and_entropy_keep_their_weight():
    cfg = LossConfig(entropy_coef=0.5, kl_coef=2.0, kl_estimator="full", mask="token", mask_max=2.0)
    tokens = TokenFields(
        advantage=torch.ones(2),
        rollout_logprob=torch.tensor([-1.0, -9.0]),
        **dict.fromkeys(("centered_kl", "anchor_logprob", "sequence_log_ratio", "geometric_log_ratio"), torch.zeros(2)),
    )
    loss, metrics = t1_token_loss(torch.full((2,), -1.0), torch.ones(2), tokens, torch.full((2,), 3.0), cfg=cfg)
    assert metrics.sums["masked"] == 1
    torch.testing.assert_close(loss, torch.tensor([1 - 0.5 + 6, -0.5 + 6]))


# Two tokens of three words: policy, mu and anchor are tables [first token], [first token, second token].
WORDS, REWARDS = 3, torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
SAMPLES = list(itertools.product(range(WORDS), repeat=2))


def tables(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((WORDS,), (WORDS, WORDS))]


def logprobs(tables):
    """[sample, token] of all samples there are."""
    first, second = (table.log_softmax(-1) for table in tables)
    return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in SAMPLES])


def expected_gradient(cfg, baseline):
    """Over all pairs of samples of mu that are one prompt's group: the gradient of the loss, through algo's own
    advantages and centred KLs, with respect to the policy's tables."""
    policy = [table.requires_grad_() for table in tables(0)]
    logp, mu, anchor = logprobs(policy), logprobs(tables(1)), logprobs(tables(2))
    now = logp.detach()
    chance = mu.sum(1).exp()
    rewards, kl = REWARDS.flatten(), (now - anchor).sum(1)
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(len(SAMPLES)), repeat=2):
        i = list(pair)
        advantage = leave_one_out(rewards[i].numpy()) if baseline else rewards[i].numpy()
        c = centered(kl[i].numpy(), np.zeros(2), "prompt" if baseline else "none")
        sums = (now - mu)[i].sum(1, keepdim=True).expand(2, 2).flatten()
        tokens = TokenFields(
            advantage=torch.from_numpy(advantage).repeat_interleave(2),
            centered_kl=torch.from_numpy(c).repeat_interleave(2),
            rollout_logprob=mu[i].flatten(),
            anchor_logprob=anchor[i].flatten(),
            sequence_log_ratio=sums,
            geometric_log_ratio=sums / 2,
        )
        loss, _ = t1_token_loss(logp[i].flatten(), torch.zeros(4), tokens, cfg=cfg)
        total = total + chance[i].prod() * loss.sum() / 2
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, policy)])


def exact_gradient():
    """Of -(E_pi[reward] - beta KL(pi||anchor)), over all samples there are."""
    policy = [table.requires_grad_() for table in tables(0)]
    logp = logprobs(policy).sum(1)
    kl = (logp.exp() * (logp - logprobs(tables(2)).sum(1))).sum()
    objective = -(logp.exp() * REWARDS.flatten()).sum() + BETA * kl
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(objective, policy)])


def test_weights_by_sequence_are_unbiased_with_the_leave_one_out_baselines():
    cfg = LossConfig(entropy_coef=0.0, kl_coef=BETA, importance="sequence")
    for baseline in (True, False):
        torch.testing.assert_close(expected_gradient(cfg, baseline), exact_gradient(), rtol=1e-10, atol=1e-12)


def test_the_baseline_drops_out_under_weights_by_token_but_not_where_they_are_bounded_or_missing():
    def moved(**given):
        cfg = LossConfig(entropy_coef=0.0, kl_coef=BETA, **given)
        return (expected_gradient(cfg, True) - expected_gradient(cfg, False)).abs().max()

    assert moved(importance="token") < 1e-12
    assert moved(importance="token", ratio_max=1.0) > 1e-3
    assert moved(importance="none") > 1e-3


def test_kl_behaviour_is_the_kl_of_mu_to_the_policy():
    logp, mu = logprobs(tables(0)), logprobs(tables(1))
    zeros = torch.zeros(1, dtype=torch.float64)
    names = ("advantage", "centered_kl", "anchor_logprob", "sequence_log_ratio", "geometric_log_ratio")
    estimates = []
    for (first, second), (mu_first, mu_second) in zip(logp, mu, strict=True):
        for at, of_mu in ((first, mu_first), (second, mu_second)):
            tokens = TokenFields(rollout_logprob=of_mu[None], **dict.fromkeys(names, zeros))
            estimates.append(t1_token_loss(at[None], zeros, tokens, cfg=LossConfig())[1].sums["kl_behaviour"])
    estimates = torch.stack(estimates)
    assert (estimates >= 0).all()
    chance = mu.sum(1).exp()
    torch.testing.assert_close(
        (chance.repeat_interleave(2) * estimates).sum(), (chance * (mu - logp).sum(1)).sum(), rtol=1e-10, atol=0
    )
