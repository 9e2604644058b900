"""The head in one process against full logits in float64: accuracy, cuts, where gradients go, extreme inputs."""

from dataclasses import replace

import pytest
import torch

from megatron_t1.algo.config import CHUNK_LOGITS
from megatron_t1.algo.head.fused import (
    TILE_LOGITS,
    fused_loss,
    logprob_entropy_nograd,
)
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.loss import sft_token_loss
from tests.algo.general_head import logprob_entropy
from tests.algo.reference import PATHS, Path, case, max_relative_error


@pytest.fixture(params=PATHS, ids=str)
def path(request) -> Path:
    return request.param


@pytest.fixture(params=["whole", "cut"])
def _cut(request, monkeypatch):
    """Everything in one tile, or tiles of 256 rows and chunks of a few tokens."""
    if request.param == "cut":
        monkeypatch.setitem(TILE_LOGITS, "cpu", 1)
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", 7000)


def _head(c, **given):
    return Head(**{"weight": c.weight, "vocab_size": c.weight.shape[0], "temperature": 1.0, **given})


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.2])
def test_loss_metrics_and_gradients(path, temperature):
    c = case(s=60, hidden_size=48, vocab_size=1000, padded_size=1024, num_targets=41, scale=3.0)
    want = path.reference(c, 1000, temperature)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    loss, metrics = path.loss(hidden, _head(c, vocab_size=1000, temperature=temperature), c)
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


@pytest.mark.parametrize("num_tokens", [1, 7, 2017, 2045, 10**6])
def test_rows_of_logits_stay_aligned(num_tokens):
    """A tile that is not a multiple of 8 columns wide costs CUDA's GEMMs two thirds of their speed."""
    slices = _head(case(s=1, hidden_size=4, vocab_size=151936, num_targets=1)).slices(num_tokens, 2**25)
    assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
    assert slices[0].start == 0
    assert slices[-1].stop == 151936
    assert all(s.start % 256 == 0 for s in slices)


@pytest.mark.usefixtures("_cut")
def test_values_over_a_real_vocabulary():
    path = Path(fused=False, full_kl=True)
    c = case(s=16, hidden_size=64, vocab_size=151936, num_targets=16, scale=4.0)
    logprob, entropy, kl = path.values(c.hidden, _head(c, temperature=0.9), c)
    want = path.reference(c, 151936, 0.9).values
    torch.testing.assert_close(logprob.double(), want[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want[1], rtol=0, atol=5e-6)
    torch.testing.assert_close(kl.double(), want[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("full_kl", [False, True])
def test_gradcheck(full_kl):
    path = Path(fused=False, full_kl=full_kl)
    c = case(s=6, hidden_size=5, vocab_size=11, padded_size=13, num_targets=4, dtype=torch.float64)
    weight = c.weight.requires_grad_()

    def f(hidden, weight):
        head = Head(weight=weight, vocab_size=11, temperature=0.8)
        return logprob_entropy(hidden, head, c.positions, c.targets, path.anchor(head, c))

    assert torch.autograd.gradcheck(f, (c.hidden.requires_grad_(), weight))


def test_bf16_inputs_are_rounded_in_dz_and_in_the_result_alone(path):
    c = case(s=40, hidden_size=64, vocab_size=3000, num_targets=30, scale=3.0, dtype=torch.bfloat16)
    want = path.reference(c, 3000, 0.9)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    loss, _ = path.loss(hidden, _head(c, temperature=0.9), c)
    loss.backward()
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert max_relative_error(hidden.grad, want.d_hidden) < 1.5 * 2**-8
    assert max_relative_error(weight.grad, want.d_weight) < 1.5 * 2**-8


@pytest.mark.parametrize("fused", [False, True])
def test_sft_without_an_entropy_gradient(fused):
    c = case(s=20, hidden_size=16, vocab_size=100, num_targets=12)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    if fused:
        loss, metrics = fused_loss(hidden, _head(c), c.positions, c.targets, sft_token_loss, c.tokens)
    else:
        values, metrics = sft_token_loss(*logprob_entropy(hidden, _head(c), c.positions, c.targets), c.tokens)
        loss = values.sum()
    got = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.nn.functional.cross_entropy(hidden[c.positions] @ weight.T, c.targets, reduction="sum")
    want = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.sums["nll"], plain)


@pytest.mark.usefixtures("_cut")
def test_main_grad_is_added_to_with_the_incoming_gradient(path):
    c = case(s=30, hidden_size=16, vocab_size=600, num_targets=25)
    want = path.reference(c, 600, 0.9)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.ones(600, 16)
    weight.grad_added_to_main_grad = False
    hidden = c.hidden.requires_grad_()
    loss, _ = path.loss(hidden, _head(c, weight=weight, temperature=0.9), c, grad_scale=0.25)
    (loss / 4).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None, "DDP's hook asserts that there is one"
    assert max_relative_error(weight.main_grad - 1, want.d_weight / 4) < 5e-6
    assert max_relative_error(hidden.grad, want.d_hidden / 4) < 5e-6


def test_an_embedding_tied_on_the_same_stage_keeps_its_own_gradient(path):
    """Megatron marks it zero_out_wgrad; DDP's hook then adds weight.grad, which must be the embedding's part alone."""
    c = case(s=30, hidden_size=16, vocab_size=100, num_targets=25)
    ids = torch.arange(30)
    c.hidden = c.weight[ids]
    want = path.reference(c, 100, 0.9)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros(100, 16)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    loss, _ = path.loss(weight[ids], _head(c, weight=weight, temperature=0.9), c)
    loss.backward()
    both = want.d_weight.index_add(0, ids, want.d_hidden)
    torch.testing.assert_close((weight.main_grad + weight.grad).double(), both, rtol=1e-4, atol=1e-5)


def test_an_unannounced_gradient_scale_is_an_error():
    path = Path(fused=True, full_kl=False)
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros_like(c.weight)
    loss, _ = path.loss(c.hidden, _head(c, weight=weight), c)
    with pytest.raises(RuntimeError, match="grad_scale"):
        (loss / 2).backward()


def test_no_grad_leaves_main_grad_alone(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    weight = torch.nn.Parameter(c.weight)
    weight.main_grad = torch.zeros_like(c.weight)
    with torch.no_grad():
        loss, _ = path.loss(c.hidden, _head(c, weight=weight), c)
    torch.testing.assert_close(loss.double(), path.reference(c, 50, 1.0).loss, rtol=1e-6, atol=0)
    assert not loss.requires_grad
    assert not weight.main_grad.any()


def test_frozen_weight_and_frozen_hidden(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    want = path.reference(c, 50, 1.0)
    for frozen in ("hidden", "weight"):
        hidden = c.hidden.clone().requires_grad_(frozen != "hidden")
        weight = c.weight.clone().requires_grad_(frozen != "weight")
        loss, _ = path.loss(hidden, _head(c, weight=weight), c)
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")
        if frozen == "hidden":
            assert max_relative_error(weight.grad, want.d_weight) < 5e-6
        else:
            assert max_relative_error(hidden.grad, want.d_hidden) < 5e-6


def test_an_empty_microbatch_or_all_tokens_masked(path):
    c = case(s=8, hidden_size=8, vocab_size=50, num_targets=5)
    full_metrics = path.loss(c.hidden, _head(c), c)[1]
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    c = replace(c, positions=c.positions[:0], targets=c.targets[:0], tokens=c.tokens[:0])
    assert [v.shape for v in path.values(hidden, _head(c), c)] == [(0,)] * (3 if path.full_kl else 2)
    loss, metrics = path.loss(hidden, _head(c), c)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert metrics.sums.keys() == full_metrics.sums.keys()


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_stay_finite_and_exact(path, temperature, logit):
    """Logits in steps of 1/4 are exact in float32 at any of these sizes, so the softmax alone is on trial."""
    g = torch.Generator().manual_seed(0)
    n, v = 12, 1000

    def wiggle():
        return torch.randint(-8, 9, (v, n), generator=g) / 4

    c = case(s=n, hidden_size=n, vocab_size=v, num_targets=n)
    c.hidden = c.anchor_hidden = torch.eye(n)
    c.weight, c.anchor_weight = wiggle() + logit, wiggle() - logit
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    head = _head(c, weight=weight, temperature=temperature)
    loss, metrics = path.loss(hidden, head, c)
    loss.backward()
    values = path.values(hidden, head, c)
    # The reference gets the float32 logits that temperature leaves.
    c.weight, c.anchor_weight = ((w * (1 / temperature)).double() for w in (c.weight, c.anchor_weight))
    want = path.reference(c, v, 1.0)
    for got, expected in zip(values, want.values, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics.sums["entropy"].double(), want.metrics.sums["entropy"], rtol=1e-5, atol=1e-5)
    assert max_relative_error(weight.grad, want.d_weight / temperature) < 1e-5
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
def test_one_hot_distributions(path, temperature):
    n, v = 6, 700
    targets = torch.arange(n) * 100

    def one_hot(at):
        return torch.zeros(v, n).index_put((at, torch.arange(n)), torch.tensor(1e4))

    c = case(s=n, hidden_size=n, vocab_size=v, num_targets=n)
    c.hidden, c.positions, c.targets = torch.eye(n), torch.arange(n), targets
    c.anchor_hidden, c.weight, c.anchor_weight = c.hidden, one_hot(targets), one_hot(targets + 1)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    head = _head(c, temperature=temperature)
    logprob, entropy, *kl = path.values(hidden, head, c)
    assert not logprob.any()
    assert not entropy.any()
    for value in kl:  # ln 1 - ln of what the anchor gives a token it excludes
        torch.testing.assert_close(value, torch.full((n,), 1e4 / temperature))
    wrong, _ = logprob_entropy_nograd(hidden, head, torch.arange(n), targets + 1)
    torch.testing.assert_close(wrong, torch.full((n,), -1e4 / temperature))
    loss, _ = path.loss(hidden, head, c)
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_the_anchor_itself_has_no_kl():
    c = case(s=20, hidden_size=32, vocab_size=500, num_targets=13, scale=10.0)
    c.anchor_hidden, c.anchor_weight = c.hidden, c.weight
    assert not Path(fused=False, full_kl=True).values(c.hidden, _head(c), c)[2].any()


def test_an_anchor_cut_otherwise_is_an_error():
    path, c = Path(fused=True, full_kl=True), case(s=4, hidden_size=8, vocab_size=50, num_targets=2)
    anchor = path.anchor(_head(c, vocab_size=40), c)
    with pytest.raises(ValueError, match="layout"):
        logprob_entropy(c.hidden, _head(c), c.positions, c.targets, anchor)


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
