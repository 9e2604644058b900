"""Plain full-logits float64 autograd of the same loss, and random cases for it."""

from dataclasses import dataclass

import torch

from megatron_t1.algo.loss import LossConfig, Metrics, TokenFields, t1_token_loss


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: TokenFields


def case(*, s, hidden_size, vocab_size, num_targets, padded_size=None, scale=1.0, dtype=torch.float32, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    return Case(
        hidden=(scale * randn(s, hidden_size)).to(dtype),
        weight=(randn(padded_size or vocab_size, hidden_size) / hidden_size**0.5).to(dtype),
        positions=torch.randperm(s, generator=g)[:num_targets].sort().values,
        targets=torch.randint(0, vocab_size, (num_targets,), generator=g),
        tokens=TokenFields(
            advantage=randn(num_targets),
            centered_kl=randn(num_targets),
            rollout_logprob=-randn(num_targets).abs() * 3,
            anchor_logprob=-randn(num_targets).abs() * 3,
        ),
    )


@dataclass
class Result:
    logprob: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    metrics: Metrics
    d_hidden: torch.Tensor
    d_weight: torch.Tensor


def reference_loss(c: Case, vocab_size: int, temperature: float, cfg: LossConfig) -> Result:
    hidden, weight = c.hidden.double().requires_grad_(), c.weight.double().requires_grad_()
    logp = torch.log_softmax(hidden[c.positions] @ weight[:vocab_size].T / temperature, -1)
    logprob = logp.gather(1, c.targets[:, None]).squeeze(1)
    entropy = torch.distributions.Categorical(logits=logp).entropy()
    loss, metrics = t1_token_loss(logprob, entropy, c.tokens, cfg)
    d_hidden, d_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
    return Result(logprob.detach(), entropy.detach(), loss.sum().detach(), metrics, d_hidden, d_weight)


def max_relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest magnitude; 0 when both are all zero."""
    scale = want.abs().max()
    return ((got.double() - want).abs().max() / scale).item() if scale else got.abs().max().item()
