"""The losses against their formulas and the KL estimators against exact expectations over a small vocabulary."""

from dataclasses import fields

import pytest
import torch

from megatron_t1.algo.config import TOKEN_LOSSES, LossConfig
from megatron_t1.algo.loss import Metrics, TokenFields, sft_token_loss, t1_token_loss, token_loss_of


def _fields(n: int, **given: torch.Tensor) -> TokenFields:
    return TokenFields(**{f.name: given.get(f.name, torch.zeros(n)) for f in fields(TokenFields)})


def _expected_gradient(estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and logit gradient of the estimator, expected over on-policy samples; loss = kl_coef * KL only."""
    g = torch.Generator().manual_seed(1)
    z, u = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    logp, anchor = z.log_softmax(0), u.log_softmax(0)
    kl = (logp.exp() * (logp - anchor)).sum()
    x = (logp - anchor).detach()
    tokens = _fields(7, anchor_logprob=anchor, centered_kl=x - (logp.exp() * x).sum().detach())
    cfg = LossConfig(entropy_coef=0.0, kl_coef=1.0, kl_estimator=estimator)
    loss, _ = t1_token_loss(logp, torch.zeros(7), tokens, cfg=cfg, kl=kl.expand(7))
    value = (logp.exp() * loss).sum()
    (grad,) = torch.autograd.grad((logp.detach().exp() * loss).sum(), z)
    return value.detach(), grad


def _exact() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    z, u = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    logp, anchor = z.log_softmax(0), u.log_softmax(0)
    kl = torch.nn.functional.kl_div(anchor, logp, log_target=True, reduction="sum")
    reverse = torch.nn.functional.kl_div(logp, anchor, log_target=True, reduction="sum")
    (grad,) = torch.autograd.grad(kl, z, retain_graph=True)
    (reverse_grad,) = torch.autograd.grad(reverse, z)
    return kl.detach(), grad, reverse_grad


@pytest.mark.parametrize(
    ("estimator", "unbiased_value", "gradient"),
    [
        ("centered", False, "forward"),
        ("k1", True, "zero"),
        ("k2", False, "forward"),
        ("k3", True, "reverse"),
        ("k3_score", True, "forward"),
        ("full", True, "forward"),
    ],
)
def test_kl_estimators_have_the_stated_expectations(estimator, unbiased_value, gradient):
    value, grad = _expected_gradient(estimator)
    kl, forward, reverse = _exact()
    want = {"forward": forward, "reverse": reverse, "zero": torch.zeros_like(forward)}[gradient]
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)
    assert torch.isclose(value, kl, rtol=1e-12).item() == unbiased_value


def test_t1_loss_is_its_formula():
    logprob, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    tokens = _fields(
        2,
        advantage=torch.tensor([0.75, -0.25]),
        centered_kl=torch.tensor([3.0, -4.0]),
        rollout_logprob=torch.tensor([-1.5, -2.0]),
    )
    loss, metrics = t1_token_loss(logprob, entropy, tokens, cfg=LossConfig(entropy_coef=0.1, kl_coef=0.01))
    torch.testing.assert_close(loss, torch.tensor([0.75 - 0.05 - 0.03, -0.5 - 0.025 + 0.08]))
    assert metrics.sums["logprob_diff"] == 0.5
    assert metrics.maxima["logprob_diff"] == 0.5
    torch.testing.assert_close(metrics.sums["ratio"], torch.tensor(0.5).exp() + 1)


@pytest.mark.parametrize("estimator", ["centered", "k1", "k2", "k3", "k3_score"])
def test_a_token_the_policy_lost_keeps_everything_finite(estimator):
    logprob = torch.tensor([-1e4], requires_grad=True)
    tokens = _fields(1, advantage=torch.ones(1), anchor_logprob=torch.tensor([-0.1]))
    loss, metrics = t1_token_loss(logprob, torch.zeros(1), tokens, cfg=LossConfig(kl_estimator=estimator))
    loss.sum().backward()
    assert torch.isfinite(logprob.grad).all()
    assert all(torch.isfinite(v) for v in (*metrics.sums.values(), *metrics.maxima.values()))


def test_no_tokens_have_the_same_metrics():
    some, none = (t1_token_loss(torch.zeros(n), torch.zeros(n), _fields(n), cfg=LossConfig())[1] for n in (3, 0))
    assert some.sums.keys() == none.sums.keys()
    assert some.maxima.keys() == none.maxima.keys()
    merged = Metrics.merge([some, none])
    assert merged == some


def test_a_loss_whose_metrics_lack_what_steps_are_held_to_is_refused(monkeypatch):
    def reinforce(logprob, entropy, tokens, kl=None, *, cfg):
        return -tokens.advantage * logprob, Metrics(sums={"entropy": entropy.sum()})

    monkeypatch.setitem(TOKEN_LOSSES._entries, "reinforce", reinforce)
    with pytest.raises(
        ValueError, match=r"loss.token_loss = 'reinforce' returns Metrics without the sum `logprob_diff`"
    ):
        token_loss_of(LossConfig(token_loss="reinforce"))
    for estimator in ("centered", "full"):
        token_loss_of(LossConfig(kl_estimator=estimator))


def test_sft_loss_is_the_negative_log_likelihood():
    loss, metrics = sft_token_loss(torch.tensor([-1.0, -3.0]), torch.tensor([0.1, 0.2]), _fields(2))
    torch.testing.assert_close(loss, torch.tensor([1.0, 3.0]))
    assert metrics.sums["nll"] == 4.0
    assert metrics.maxima["nll"] == 3.0


def test_full_kl_needs_the_heads_kl():
    with pytest.raises(ValueError, match="anchor"):
        t1_token_loss(torch.zeros(1), torch.zeros(1), _fields(1), cfg=LossConfig(kl_estimator="full"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"entropy_coef": float("nan")}, "entropy_coef = nan must be 0 or more"),
        ({"kl_coef": float("inf")}, "kl_coef = inf must be 0 or more"),
        ({"importance": "tis"}, "importance"),
        ({"importance": "token", "ratio_min": 1.5}, "ratio_min"),
        ({"importance": "token", "ratio_max": 0.5}, "ratio_max"),
        ({"importance": "ppo"}, "importance"),
        ({"mask": "token"}, "mask"),
        ({"ratio_max": 2.0, "mask": "token", "mask_max": 2.0}, "ratio_max"),
        ({"mask_min": 0.5}, "mask_min"),
        ({"mask": "sequence", "mask_min": 1e-10}, r"mask_min = 1e-10 lies beyond e\^20"),
        ({"importance": "sequence", "ratio_max": 1e9}, "ratio_max = 1000000000.0 lies beyond"),
        ({"mask": "token", "mask_max": float("nan")}, "mask_max"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"kl_baseline": "group"}, "kl_baseline"),
        ({"kl_baseline": "none", "kl_estimator": "k3"}, "kl_baseline"),
        ({"kl_baseline": "batch", "kl_coef": 0}, "kl_baseline = 'batch' is not read with loss.kl_coef = 0"),
        ({"kl_estimator": "full", "kl_coef": 0}, "kl_estimator = 'full' is not read with loss.kl_coef = 0"),
    ],
)
def test_config_errors_name_the_field(given, name):
    with pytest.raises(ValueError, match=name):
        LossConfig(**given)
