"""The head in one process against full logits in float64: accuracy, cuts, where gradients go, extreme inputs."""

import pytest
import torch

from megatron_t1.algo import fused_head
from megatron_t1.algo.fused_head import fused_loss, logprob_entropy, logprob_entropy_nograd
from megatron_t1.algo.head import Head
from megatron_t1.algo.loss import LossConfig, sft_token_loss, t1_token_loss
from tests.algo.reference import case, max_relative_error, reference_loss

CFG = LossConfig(entropy_coef=0.1, kl_coef=0.1)


def token_loss(logprob, entropy, tokens):
    return t1_token_loss(logprob, entropy, tokens, CFG)


def general_loss(hidden, head, positions, targets, loss, tokens):
    values, metrics = loss(*logprob_entropy(hidden, head, positions, targets), tokens)
    return values.sum(), metrics


PATHS = pytest.mark.parametrize("path", [general_loss, fused_loss])


@pytest.fixture(params=["whole", "cut"])
def _cut(request, monkeypatch):
    """Everything in one tile, or tiles of 256 rows and chunks of a few tokens."""
    if request.param == "cut":
        monkeypatch.setitem(fused_head.TILE_LOGITS, "cpu", 1)
        monkeypatch.setitem(fused_head.CHUNK_LOGITS, "cpu", 7000)


@PATHS
@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.2])
def test_loss_metrics_and_gradients(path, temperature):
    c = case(s=60, hidden_size=48, vocab_size=1000, padded_size=1024, num_targets=41, scale=3.0)
    want = reference_loss(c, 1000, temperature, CFG)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    head = Head(weight=weight, vocab_size=1000, temperature=temperature)
    loss, metrics = path(hidden, head, c.positions, c.targets, token_loss, c.tokens)
    loss.backward()
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=0)
    for kind in ("sums", "maxima"):
        got, expected = getattr(metrics, kind), getattr(want.metrics, kind)
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name].double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert max_relative_error(hidden.grad, want.d_hidden) < 5e-6
    assert max_relative_error(weight.grad, want.d_weight) < 5e-6
    assert not weight.grad[1000:].any()
    masked = torch.ones(60, dtype=torch.bool).index_fill(0, c.positions, False)
    assert not hidden.grad[masked].any()


@pytest.mark.usefixtures("_cut")
def test_logprob_and_entropy_over_a_real_vocabulary():
    c = case(s=16, hidden_size=64, vocab_size=151936, num_targets=16, scale=4.0)
    want = reference_loss(c, 151936, 0.9, CFG)
    head = Head(weight=c.weight, vocab_size=151936, temperature=0.9)
    logprob, entropy = logprob_entropy_nograd(c.hidden, head, c.positions, c.targets)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want.entropy, rtol=0, atol=5e-6)


def test_gradcheck():
    c = case(s=6, hidden_size=5, vocab_size=11, padded_size=13, num_targets=4, dtype=torch.float64)
    weight = c.weight.requires_grad_()

    def f(hidden, weight):
        return logprob_entropy(hidden, Head(weight=weight, vocab_size=11, temperature=0.8), c.positions, c.targets)

    assert torch.autograd.gradcheck(f, (c.hidden.requires_grad_(), weight))


@PATHS
def test_bf16_inputs_lose_nothing_but_their_own_rounding(path):
    c = case(s=40, hidden_size=64, vocab_size=3000, num_targets=30, scale=3.0, dtype=torch.bfloat16)
    want = reference_loss(c, 3000, 0.9, CFG)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    head = Head(weight=weight, vocab_size=3000, temperature=0.9)
    loss, _ = path(hidden, head, c.positions, c.targets, token_loss, c.tokens)
    loss.backward()
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert max_relative_error(hidden.grad, want.d_hidden) < 2**-8
    assert max_relative_error(weight.grad, want.d_weight) < 2**-8


@PATHS
def test_sft_without_an_entropy_gradient(path):
    c = case(s=20, hidden_size=16, vocab_size=100, num_targets=12)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    head = Head(weight=weight, vocab_size=100, temperature=1.0)
    loss, metrics = path(hidden, head, c.positions, c.targets, sft_token_loss, c.tokens)
    got = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.nn.functional.cross_entropy(hidden[c.positions] @ weight.T, c.targets, reduction="sum")
    want = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert metrics.sums["num_tokens"] == 12


@PATHS
@pytest.mark.usefixtures("_cut")
def test_main_grad_is_added_to_with_the_incoming_gradient(path):
    c = case(s=30, hidden_size=16, vocab_size=600, num_targets=25)
    want = reference_loss(c, 600, 0.9, CFG)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.ones(600, 16)
    weight.grad_added_to_main_grad = False
    head = Head(weight=weight, vocab_size=600, temperature=0.9)
    hidden = c.hidden.requires_grad_()
    extra = {"grad_scale": 0.25} if path is fused_loss else {}
    loss, _ = path(hidden, head, c.positions, c.targets, token_loss, c.tokens, **extra)
    (loss / 4).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None, "DDP's hook asserts that there is one"
    assert max_relative_error(weight.main_grad - 1, want.d_weight / 4) < 5e-6
    assert max_relative_error(hidden.grad, want.d_hidden / 4) < 5e-6


@PATHS
def test_an_embedding_tied_on_the_same_stage_keeps_its_own_gradient(path):
    """Megatron marks it zero_out_wgrad; DDP's hook then adds weight.grad, which must be the embedding's part alone."""
    c = case(s=30, hidden_size=16, vocab_size=100, num_targets=25)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros(100, 16)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    ids = torch.arange(30)
    loss, _ = path(
        weight[ids], Head(weight=weight, vocab_size=100, temperature=0.9), c.positions, c.targets, token_loss, c.tokens
    )
    loss.backward()
    plain = c.weight.detach().requires_grad_()
    logp = torch.log_softmax(plain[ids][c.positions] @ plain.T / 0.9, -1)
    logprob, entropy = logp.gather(1, c.targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    token_loss(logprob, entropy, c.tokens)[0].sum().backward()
    torch.testing.assert_close(weight.main_grad + weight.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_an_unannounced_gradient_scale_is_an_error():
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros_like(c.weight)
    head = Head(weight=weight, vocab_size=50, temperature=1.0)
    loss, _ = fused_loss(c.hidden, head, c.positions, c.targets, token_loss, c.tokens)
    with pytest.raises(RuntimeError, match="grad_scale"):
        (loss / 2).backward()


@PATHS
def test_no_grad_leaves_main_grad_alone(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros_like(c.weight)
    head = Head(weight=weight, vocab_size=50, temperature=1.0)
    with torch.no_grad():
        loss, _ = path(c.hidden, head, c.positions, c.targets, token_loss, c.tokens)
    torch.testing.assert_close(loss.double(), reference_loss(c, 50, 1.0, CFG).loss, rtol=1e-6, atol=0)
    assert not loss.requires_grad
    assert not weight.main_grad.any()


@PATHS
def test_frozen_weight_and_frozen_hidden(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    want = reference_loss(c, 50, 1.0, CFG)
    for frozen in ("hidden", "weight"):
        hidden = c.hidden.clone().requires_grad_(frozen != "hidden")
        weight = c.weight.clone().requires_grad_(frozen != "weight")
        head = Head(weight=weight, vocab_size=50, temperature=1.0)
        loss, _ = path(hidden, head, c.positions, c.targets, token_loss, c.tokens)
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")
        if frozen == "hidden":
            assert max_relative_error(weight.grad, want.d_weight) < 5e-6
        else:
            assert max_relative_error(hidden.grad, want.d_hidden) < 5e-6


@PATHS
def test_empty_microbatch(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    full_metrics = path(c.hidden, _head(c), c.positions, c.targets, token_loss, c.tokens)[1]
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    head = Head(weight=weight, vocab_size=50, temperature=1.0)
    loss, metrics = path(hidden, head, c.positions[:0], c.targets[:0], token_loss, c.tokens[:0])
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert metrics.sums.keys() == full_metrics.sums.keys()


def _head(c, **given):
    return Head(**{"weight": c.weight, "vocab_size": c.weight.shape[0], "temperature": 1.0, **given})


@PATHS
@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_stay_finite_and_exact(path, temperature, logit):
    """Logits in steps of 1/4 are exact in float32 at any of these sizes, so the softmax alone is on trial."""
    g = torch.Generator().manual_seed(0)
    n, v = 12, 1000
    wiggle = torch.randint(-8, 9, (v, n), generator=g) / 4
    weight = (wiggle + logit).requires_grad_()
    hidden = torch.eye(n).requires_grad_()
    head = Head(weight=weight, vocab_size=v, temperature=temperature)
    targets = torch.randint(0, v, (n,), generator=g)
    c = case(s=n, hidden_size=n, vocab_size=v, num_targets=n)
    c.hidden, c.weight, c.targets = hidden.detach(), weight.detach(), targets
    # The reference gets the float32 logits that temperature leaves.
    c.weight = (c.weight * (1 / temperature)).double()
    want = reference_loss(c, v, 1.0, CFG)
    loss, metrics = path(hidden, head, c.positions, targets, token_loss, c.tokens)
    loss.backward()
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics.sums["entropy"].double(), want.metrics.sums["entropy"], rtol=1e-5, atol=1e-5)
    assert max_relative_error(weight.grad, want.d_weight / temperature) < 1e-5
    assert torch.isfinite(hidden.grad).all()


@PATHS
@pytest.mark.usefixtures("_cut")
def test_one_hot_distributions(path):
    n, v = 6, 700
    targets = torch.arange(n) * 100
    weight = torch.zeros(v, n).index_put((targets, torch.arange(n)), torch.tensor(1e4)).requires_grad_()
    hidden = torch.eye(n).requires_grad_()
    head = Head(weight=weight, vocab_size=v, temperature=0.05)
    logprob, entropy = logprob_entropy_nograd(hidden, head, torch.arange(n), targets)
    assert not logprob.any()
    assert not entropy.any()
    wrong, _ = logprob_entropy_nograd(hidden, head, torch.arange(n), targets + 1)
    torch.testing.assert_close(wrong, torch.full((n,), -2e5))
    c = case(s=n, hidden_size=n, vocab_size=v, num_targets=n)
    loss, _ = path(hidden, head, torch.arange(n), targets, token_loss, c.tokens)
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("target", [-1, 50, 51])
def test_a_target_outside_the_vocabulary_is_loud(target):
    c = case(s=4, hidden_size=8, vocab_size=50, padded_size=64, num_targets=2)
    logprob, _ = logprob_entropy_nograd(c.hidden, _head(c, vocab_size=50), c.positions, torch.tensor([3, target]))
    assert torch.isfinite(logprob[0])
    assert logprob[1] == -torch.inf


def test_head_errors_name_the_field():
    with pytest.raises(ValueError, match="temperature"):
        Head(weight=torch.zeros(2, 2), vocab_size=2, temperature=0.0)
    with pytest.raises(ValueError, match="tp_group"):
        Head(weight=torch.zeros(2, 2), vocab_size=2, temperature=1.0, sequence_parallel=True)
