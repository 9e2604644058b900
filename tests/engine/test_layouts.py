"""Golden layouts: loss, metrics, gradients and updated weights are those of a plain float64 process, however it is cut.

The reference is transformers' model in float64 and a textbook loss on its full logits, sequence by sequence.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.batch import TEMPERATURE, make_sequences
from tests.launch import run_ranks
from tests.tiny import make_tiny_qwen2

VOCAB = 321  # odd: padded to TP in Megatron
ALPHA, BETA = 0.02, 0.05
WORKER = Path(__file__).with_name("layout_worker.py")

LAYOUTS = {
    "one process, one microbatch": (1, {"max_tokens_per_microbatch": 1024, "distributed_optimizer": False}),
    "one process, five microbatches": (1, {"max_tokens_per_microbatch": 80, "distributed_optimizer": False}),
    "TP2": (2, {"tensor": 2, "max_tokens_per_microbatch": 120, "distributed_optimizer": False}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True, "max_tokens_per_microbatch": 120,
                   "distributed_optimizer": False}),
    "PP2": (2, {"pipeline": 2, "max_tokens_per_microbatch": 100, "distributed_optimizer": False}),
    "DP2": (2, {"max_tokens_per_microbatch": 90, "distributed_optimizer": False}),
    "DP2 distributed optimizer": (2, {"max_tokens_per_microbatch": 90}),
    "TP2 PP2 SP": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "max_tokens_per_microbatch": 100,
                       "distributed_optimizer": False}),
}  # fmt: skip


def per_token(model, sequences):
    """For each sequence: logprob and entropy of its response tokens, float64, from the full logits."""
    for s in sequences:
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])
        logits = model(ids[None]).logits[0, len(s.prompt_ids) - 1 : -1].double() / TEMPERATURE
        logps = logits.log_softmax(-1)
        yield logps[torch.arange(len(logps)), torch.tensor(s.response_ids)], -(logps.exp() * logps).sum(-1)


def gradients(model):
    named = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return named


# Untied embeddings take another way only where the head is cut or lies on another stage.
CASES = [(True, layout) for layout in LAYOUTS] + [(False, "TP2"), (False, "PP2")]


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    policy_dir = make_tiny_qwen2(folder / "policy", tied=request.param, vocab_size=VOCAB, init_std=0.1)
    anchor_dir = make_tiny_qwen2(folder / "anchor", tied=request.param, vocab_size=VOCAB, init_std=0.1, seed=1)
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    anchor = AutoModelForCausalLM.from_pretrained(anchor_dir, dtype=torch.float64)
    sequences = make_sequences(VOCAB)
    count = sum(len(s.response_ids) for s in sequences)

    sft = sum(-logprob.sum() for logprob, _ in per_token(model, sequences)) / count
    sft.backward()
    sft_grads = gradients(model)

    with torch.no_grad():
        anchors = [logprob for logprob, _ in per_token(anchor, sequences)]
    kl = torch.stack(
        [(torch.tensor(s.rollout_logprobs).double() - a).sum() for s, a in zip(sequences, anchors, strict=True)]
    )
    loss, entropy_sum, k1_sum = 0.0, 0.0, 0.0
    for s, a, c, (logprob, entropy) in zip(
        sequences, anchors, kl - kl.mean(), per_token(model, sequences), strict=True
    ):
        loss = loss + (-s.advantage * logprob - ALPHA * entropy + BETA * c * logprob).sum()
        entropy_sum += entropy.sum().item()
        k1_sum += (logprob - a).sum().item()
    (loss / count).backward()
    rl_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    # The engine has taken its SFT step before: Adam's moments carry that gradient, the weights were loaded anew.
    weights = {
        name: adam_second_step(p.detach(), sft_grads[name], rl_grads[name]) for name, p in model.named_parameters()
    }
    average = {name: 0.75 * a.detach() + 0.25 * weights[name] for name, a in anchor.named_parameters()}
    return {
        "dirs": (policy_dir, anchor_dir), "sft": (sft.item(), sft_grads), "rl": (loss.item() / count, rl_grads),
        "entropy": entropy_sum / count, "kl_k1": k1_sum / count, "weights": weights, "average": average,
    }  # fmt: skip


def adam_second_step(weight, first, second, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-2):
    m = beta1 * (1 - beta1) * first + (1 - beta1) * second
    v = beta2 * (1 - beta2) * first**2 + (1 - beta2) * second**2
    return weight - lr * (m / (1 - beta1**2)) / ((v / (1 - beta2**2)).sqrt() + eps)


def assert_close(actual: dict, expected: dict, relative: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error <= relative, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("reference", "layout"), CASES, indirect=["reference"], ids=[f"{'tied' if t else 'untied'} {x}" for t, x in CASES]
)
def test_equals_the_plain_reference(layout, reference, tmp_path):
    num_ranks, parallel = LAYOUTS[layout]
    policy_dir, anchor_dir = reference["dirs"]
    run_ranks(WORKER, num_ranks, policy_dir, tmp_path, json.dumps(parallel), anchor_dir)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("sft", "rl"):
        loss, grads = reference[name]
        assert metrics[name]["loss"] == pytest.approx(loss, rel=1e-5)
        if not parallel.get("distributed_optimizer", True):
            assert_close(load_file(tmp_path / f"{name}.safetensors"), grads, 1e-5)
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        assert metrics[name]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["rl"]["entropy"] == pytest.approx(reference["entropy"], rel=1e-5)
    assert metrics["rl"]["kl_k1"] == pytest.approx(reference["kl_k1"], rel=1e-5)
    assert metrics["rl"]["num_tokens"] == pytest.approx(1.0)
    assert_close(load_file(tmp_path / "weights.safetensors"), reference["weights"], 1e-6)
    assert_close(load_file(tmp_path / "anchor.safetensors"), reference["average"], 1e-6)
