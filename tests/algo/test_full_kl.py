"""Full-vocabulary KL and its gradient against float64 autograd; tiles of 256 rows exercise the merge."""

import pytest
import torch

from megatron_t1.algo import fused_head
from megatron_t1.algo.full_kl import logprob_entropy_kl
from megatron_t1.algo.head import Head
from tests.algo.reference import case, max_relative_error


@pytest.mark.parametrize("tile_logits", [1, 2**21])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_and_gradient(tile_logits, scale, monkeypatch):
    monkeypatch.setitem(fused_head.TILE_LOGITS, "cpu", tile_logits)
    tau, vocab_size = 0.8, 1000
    c, anchor = (
        case(s=20, hidden_size=32, vocab_size=vocab_size, padded_size=1024, num_targets=13, scale=scale, seed=seed)
        for seed in (0, 1)
    )
    g = torch.randn(3, 13)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    outputs = logprob_entropy_kl(
        hidden,
        Head(weight=weight, vocab_size=vocab_size, temperature=tau),
        anchor.hidden,
        Head(weight=anchor.weight, vocab_size=vocab_size, temperature=tau),
        c.positions,
        c.targets,
    )
    got = torch.autograd.grad((torch.stack(outputs) * g).sum(), (hidden, weight))

    h, w = c.hidden.detach().double().requires_grad_(), c.weight.detach().double().requires_grad_()
    logp = torch.log_softmax(h[c.positions] @ w[:vocab_size].T / tau, -1)
    logq = torch.log_softmax(anchor.hidden.double()[c.positions] @ anchor.weight.double()[:vocab_size].T / tau, -1)
    want_outputs = (
        logp.gather(1, c.targets[:, None]).squeeze(1),
        torch.distributions.Categorical(logits=logp).entropy(),
        torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1),
    )
    want = torch.autograd.grad((torch.stack(want_outputs) * g).sum(), (h, w))
    for a, b in zip((*outputs, *got), (*want_outputs, *want), strict=True):
        assert max_relative_error(a.detach(), b.detach()) < 1e-5 * max(1.0, scale / 10)


def test_the_anchor_itself_has_no_kl():
    c = case(s=20, hidden_size=32, vocab_size=500, num_targets=13, scale=10.0)
    head = Head(weight=c.weight, vocab_size=500, temperature=1.0)
    _, _, kl = logprob_entropy_kl(c.hidden, head, c.hidden, head, c.positions, c.targets)
    assert not kl.any()


def test_different_rows_are_an_error():
    c = case(s=4, hidden_size=8, vocab_size=50, num_targets=2)
    head, other = (Head(weight=c.weight, vocab_size=v, temperature=1.0) for v in (50, 40))
    with pytest.raises(ValueError, match="layout"):
        logprob_entropy_kl(c.hidden, head, c.hidden, other, c.positions, c.targets)
