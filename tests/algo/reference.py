"""Random cases, the head's paths under one signature, and the same loss by plain float64 autograd on full logits."""

from dataclasses import dataclass, replace

import torch

from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.head.fused import fused_loss, logprob_entropy_nograd
from megatron_t1.algo.head.layout import AnchorHead, Head
from megatron_t1.algo.loss import Metrics, TokenFields, t1_token_loss
from tests.algo.general_head import logprob_entropy


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: TokenFields
    anchor_hidden: torch.Tensor
    anchor_weight: torch.Tensor


def case(*, s, hidden_size, vocab_size, num_targets, padded_size=None, scale=1.0, dtype=torch.float32, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    def model():
        hidden = (scale * randn(s, hidden_size)).to(dtype)
        return hidden, (randn(padded_size or vocab_size, hidden_size) / hidden_size**0.5).to(dtype)

    hidden, weight = model()
    anchor_hidden, anchor_weight = model()
    return Case(
        hidden=hidden,
        weight=weight,
        positions=torch.randperm(s, generator=g)[:num_targets].sort().values,
        targets=torch.randint(0, vocab_size, (num_targets,), generator=g),
        tokens=TokenFields(
            advantage=randn(num_targets),
            centered_kl=randn(num_targets),
            rollout_logprob=-randn(num_targets).abs() * 3,
            anchor_logprob=-randn(num_targets).abs() * 3,
            sequence_log_ratio=randn(num_targets),
            geometric_log_ratio=randn(num_targets),
        ),
        anchor_hidden=anchor_hidden,
        anchor_weight=anchor_weight,
    )


@dataclass(frozen=True)
class Path:
    """A way through the head; all end in a loss of the same form."""

    fused: bool
    full_kl: bool

    def __str__(self) -> str:
        return ("fused" if self.fused else "general") + (" full KL" if self.full_kl else "")

    @property
    def cfg(self) -> LossConfig:
        return LossConfig(entropy_coef=0.1, kl_coef=0.1, kl_estimator="full" if self.full_kl else "centered")

    def token_loss(self, logprob, entropy, tokens, kl=None):
        return t1_token_loss(logprob, entropy, tokens, kl, cfg=self.cfg)

    def anchor(self, head: Head, c: Case) -> AnchorHead | None:
        return AnchorHead(hidden=c.anchor_hidden, head=replace(head, weight=c.anchor_weight)) if self.full_kl else None

    def values(self, hidden: torch.Tensor, head: Head, c: Case) -> tuple[torch.Tensor, ...]:
        """Forward only: logprob, entropy, and KL where the path has it."""
        return logprob_entropy_nograd(hidden, head, c.positions, c.targets, self.anchor(head, c))

    def loss(self, hidden: torch.Tensor, head: Head, c: Case, grad_scale: float = 1.0) -> tuple[torch.Tensor, Metrics]:
        if self.fused:
            return fused_loss(
                hidden, head, c.positions, c.targets, self.token_loss, c.tokens,
                grad_scale=grad_scale, anchor=self.anchor(head, c),
            )  # fmt: skip
        logprob, entropy, *kl = logprob_entropy(hidden, head, c.positions, c.targets, self.anchor(head, c))
        values, metrics = self.token_loss(logprob, entropy, c.tokens, *kl)
        return values.sum(), metrics

    def reference(self, c: Case, vocab_size: int, temperature: float) -> "Result":
        """The same in float64 on full logits."""
        hidden, weight = c.hidden.detach().double().requires_grad_(), c.weight.detach().double().requires_grad_()
        logp = torch.log_softmax(hidden[c.positions] @ weight[:vocab_size].T / temperature, -1)
        logprob = logp.gather(1, c.targets[:, None]).squeeze(1)
        entropy = torch.distributions.Categorical(logits=logp).entropy()
        anchor_logits = c.anchor_hidden.double()[c.positions] @ c.anchor_weight.double()[:vocab_size].T / temperature
        kl = torch.nn.functional.kl_div(anchor_logits.log_softmax(-1), logp, log_target=True, reduction="none").sum(-1)
        values = (logprob, entropy, kl) if self.full_kl else (logprob, entropy)
        loss, metrics = self.token_loss(logprob, entropy, c.tokens, *values[2:])
        d_hidden, d_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
        return Result(tuple(v.detach() for v in values), loss.sum().detach(), metrics, d_hidden, d_weight)


PATHS = [Path(fused=fused, full_kl=full_kl) for full_kl in (False, True) for fused in (False, True)]


@dataclass
class Result:
    values: tuple[torch.Tensor, ...]
    """logprob, entropy, and KL where the path has it"""
    loss: torch.Tensor
    metrics: Metrics
    d_hidden: torch.Tensor
    d_weight: torch.Tensor


def max_relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest magnitude; 0 when both are all zero."""
    scale = want.abs().max()
    return ((got.double() - want).abs().max() / scale).item() if scale else got.abs().max().item()
