"""Golden layouts: loss, metrics, gradients and updated weights are those of a plain float64 process, however it is cut.

The reference is transformers' model in float64 and a textbook loss on its full logits, sequence by sequence.
"""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_t1.data.packing import pack
from tests.engine.batch import COEFFICIENTS, LOSSES, TEMPERATURE, make_sequences
from tests.forks import WORKERS
from tests.tiny import make_tiny_qwen2

VOCAB = 321  # odd: padded to TP in Megatron
WORKER = WORKERS / "layout_worker.py"

LAYOUTS = {
    "one process, one microbatch": (1, {"max_tokens_per_microbatch": 1024, "distributed_optimizer": False}),
    "one process, five microbatches": (1, {"max_tokens_per_microbatch": 80, "distributed_optimizer": False}),
    "TP2": (2, {"tensor": 2, "max_tokens_per_microbatch": 120, "distributed_optimizer": False}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True, "max_tokens_per_microbatch": 120,
                   "distributed_optimizer": False}),
    "PP2": (2, {"pipeline": 2, "max_tokens_per_microbatch": 100, "distributed_optimizer": False}),
    "DP2": (2, {"max_tokens_per_microbatch": 90, "distributed_optimizer": False}),
    "DP2 distributed optimizer": (2, {"max_tokens_per_microbatch": 90}),
    "DP2 overlap": (2, {"max_tokens_per_microbatch": 90, "distributed_optimizer": False, "overlap_grad_reduce": True}),
    "CP2": (2, {"context": 2, "max_tokens_per_microbatch": 40, "distributed_optimizer": False}),
    "DP2 TP2": (4, {"tensor": 2, "max_tokens_per_microbatch": 90, "distributed_optimizer": False}),
    "TP2 PP2 SP": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "max_tokens_per_microbatch": 100,
                       "distributed_optimizer": False}),
    "CP4": (4, {"context": 4, "max_tokens_per_microbatch": 64, "distributed_optimizer": False}),
    "CP2 DP2": (4, {"context": 2, "max_tokens_per_microbatch": 48, "distributed_optimizer": False}),
    "CP2 TP2 SP": (4, {"context": 2, "tensor": 2, "sequence_parallel": True, "max_tokens_per_microbatch": 64,
                       "distributed_optimizer": False}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2, "max_tokens_per_microbatch": 50, "distributed_optimizer": False}),
}  # fmt: skip


def log_softmaxes(model, sequences):
    """For each sequence: float64 [num_response_tokens, vocabulary] from the full logits."""
    for s in sequences:
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])
        logits = model(ids[None]).logits[0, len(s.prompt_ids) - 1 : -1].double() / TEMPERATURE
        yield logits.log_softmax(-1)


def token_loss(name, s, logps, anchor_logps, centered_kl):
    """One sequence's loss and metrics, each [num_response_tokens], by the textbook."""
    at = torch.arange(len(logps)), torch.tensor(s.response_ids)
    logprob, anchor = logps[at], anchor_logps[at]
    entropy = -(logps.exp() * logps).sum(-1)
    ratio = (logprob - torch.tensor(s.rollout_logprobs).double()).exp()
    if name == "sft":
        return -logprob, {"nll": -logprob, "entropy": entropy}
    cfg = COEFFICIENTS | LOSSES[name]
    k1 = logprob - anchor
    weight, corrections = torch.ones_like(ratio), {}
    if "importance" in cfg:
        product, mean = ratio.prod().item(), ratio.log().mean().exp().item()
        if name == "sequence":
            factor, cut, dropped = min(max(product, 0.1), 1.5), not 0.1 <= product <= 1.5, mean < 0.55
        else:
            cut, dropped = mean > 1.03 if s.advantage > 0 else mean < 0.8, not 1e-5 <= product <= 1.5
            factor = 0.0 if cut else mean
        weight *= 0.0 if dropped else factor
        corrections = {"weight": weight, "clip_fraction": weight * 0 + cut, "masked": weight * 0 + dropped}
    pg_loss = -weight * s.advantage * logprob
    kl_loss = (logps.exp() * (logps - anchor_logps)).sum(-1) if name == "full_kl" else weight * centered_kl * logprob
    metrics = {
        "entropy": entropy, "logprob": logprob, "pg_loss": pg_loss, "ratio": ratio, "logprob_diff": ratio.log().abs(),
        "prob_diff": (logprob.exp() - torch.tensor(s.rollout_logprobs).double().exp()).abs(),
        "kl_behaviour": ratio - 1 - ratio.log(), **corrections,
    }  # fmt: skip
    if cfg["kl_coef"]:
        metrics |= {"kl_loss": kl_loss, "kl_k1": k1, "kl_k3": (-k1).exp() - 1 + k1}
    return pg_loss - cfg["entropy_coef"] * entropy + cfg["kl_coef"] * kl_loss, metrics


def centred(kl, groups, name):
    """c_i = KL_i - the mean of KL_j over the others j: of its prompt (T1), of the batch, or of nobody."""
    alike = {"batch_kl": lambda i, j: True, "plain_kl": lambda i, j: False}
    is_other = alike.get(name, lambda i, j: groups[i] == groups[j])
    c = []
    for i in range(len(kl)):
        others = [kl[j] for j in range(len(kl)) if j != i and is_other(i, j)]
        c.append(kl[i] - (sum(others) / len(others) if others else 0.0))
    return c


def gradients(model):
    named = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return named


# Untied embeddings take another way only where the head is cut or lies on another stage.
CASES = [(True, layout) for layout in LAYOUTS] + [(False, "TP2"), (False, "PP2")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return functools.cache(lambda tied: plain_steps(tmp_path_factory.mktemp("layouts"), tied))


def plain_steps(folder, tied):
    """The models, and what a plain process makes of the batch: losses, metrics, gradients, weights, their average."""
    policy_dir = make_tiny_qwen2(folder / "policy", tied=tied, vocab_size=VOCAB, init_std=0.1)
    anchor_dir = make_tiny_qwen2(folder / "anchor", tied=tied, vocab_size=VOCAB, init_std=0.1, seed=1)
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    anchor = AutoModelForCausalLM.from_pretrained(anchor_dir, dtype=torch.float64)
    sequences = make_sequences(VOCAB)
    with torch.no_grad():
        anchors = list(log_softmaxes(anchor, sequences))
        kl = [
            (policy - a)[torch.arange(len(a)), torch.tensor(s.response_ids)].sum().item()
            for s, policy, a in zip(sequences, log_softmaxes(model, sequences), anchors, strict=True)
        ]
    steps = {}
    for name in ("sft", *LOSSES):
        losses, metrics = [], {}
        c = centred(kl, [s.group for s in sequences], name)
        everything = zip(sequences, log_softmaxes(model, sequences), anchors, c, strict=True)
        for s, logps, anchor_logps, centered in everything:
            loss, parts = token_loss(name, s, logps, anchor_logps, centered)
            losses.append(loss)
            for key, value in parts.items():
                metrics.setdefault(key, []).append(value.detach())
        losses = torch.cat(losses)
        losses.mean().backward()
        metrics = {key: torch.cat(values) for key, values in metrics.items()}
        steps[name] = losses.detach(), metrics, gradients(model)
    # The engine takes the steps one after another: Adam's moments go on, the weights are loaded anew each time.
    all_grads = [grads for _, _, grads in steps.values()]
    weights = {
        name: adam_step(p.detach(), [grads[name] for grads in all_grads]) for name, p in model.named_parameters()
    }
    average = {name: 0.75 * a.detach() + 0.25 * weights[name] for name, a in anchor.named_parameters()}
    return {
        "dirs": (policy_dir, anchor_dir),
        "steps": steps,
        "weights": weights,
        "average": average,
        "kl": np.array(kl),
    }


def adam_step(weight, grads, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-2):
    """The last of some steps that all began at `weight`."""
    m = v = 0.0
    for grad in grads:
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m, v = m / (1 - beta1 ** len(grads)), v / (1 - beta2 ** len(grads))
    return weight - lr * m / (v.sqrt() + eps)


def assert_close(actual: dict, expected: dict, relative: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error <= relative, f"{name}: relative error {error:.2e}"


def near_mean(values):
    """Within 1e-5 of what is summed: tokens of both signs nearly cancel in some of the means."""
    return pytest.approx(values.mean().item(), rel=0, abs=1e-5 * values.abs().mean().item())


def balance_of(parallel, num_ranks, model_dir):
    """Imbalance and padding of the packed batch; work as transformers' sizes have it: 2 flops a weight and token, and
    half of the pairs of a sequence for keys and for values."""
    config = AutoConfig.from_pretrained(model_dir)
    sequences = make_sequences(VOCAB)
    tensor, pipeline, context = (parallel.get(name, 1) for name in ("tensor", "pipeline", "context"))
    dp_size = num_ranks // tensor // pipeline // context
    layout = {"max_tokens": parallel["max_tokens_per_microbatch"], "multiple": tensor, "context_size": context}
    ranks = [pack(sequences, dp_rank=rank, dp_size=dp_size, **layout) for rank in range(dp_size)]
    kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * config.hidden_size * (config.hidden_size + kv) + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + VOCAB * config.hidden_size
    attention = config.num_hidden_layers * config.hidden_size
    lengths = [np.concatenate([mb.cu_seqlens.diff().double().numpy() for mb in rank]) for rank in ranks]
    work = [2 * (weights * n + attention * n**2).sum() for n in lengths]
    used = sum(s.num_tokens for s in sequences) / np.concatenate(lengths).sum()
    return {"packing/imbalance": max(work) / np.mean(work) - 1, "packing/padding": 1 - used}


@pytest.mark.parametrize(("tied", "layout"), CASES, ids=[f"{'tied' if t else 'untied'} {x}" for t, x in CASES])
def test_equals_the_plain_reference(tied, layout, reference, run_ranks, tmp_path):
    num_ranks, parallel = LAYOUTS[layout]
    reference = reference(tied)
    policy_dir, anchor_dir = reference["dirs"]
    run_ranks(WORKER, num_ranks, policy_dir, tmp_path, json.dumps(parallel), anchor_dir)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name, (losses, per_token, grads) in reference["steps"].items():
        got = metrics[name]
        if name in ("rl", "batch_kl", "plain_kl", "sequence"):
            assert got.pop("kl_sample") == pytest.approx(reference["kl"].mean(), rel=1e-5)
            assert got.pop("kl_sample_std") == pytest.approx(reference["kl"].std(), rel=1e-5)
        if (weight := per_token.get("weight")) is not None:
            share = weight.mean() ** 2 / weight.square().mean()
            assert got.pop("effective_sample_size") == pytest.approx(share.item(), rel=1e-5)
        assert got["loss"] == near_mean(losses)
        assert got["num_tokens"] == pytest.approx(next(iter(per_token.values())).numel())
        for key, values in per_token.items():
            assert got[key] == near_mean(values), f"{name}: {key}"
            if f"{key}_max" in got:
                assert got[f"{key}_max"] == pytest.approx(values.max().item(), rel=1e-5), f"{name}: {key}_max"
        named = {key.removesuffix("_max") for key in got}
        assert named == per_token.keys() | {"loss", "num_tokens", "grad_norm", "lr", "skipped"}
        if not parallel.get("distributed_optimizer", True):
            assert_close(load_file(tmp_path / f"{name}.safetensors"), grads, 1e-5)
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        assert got["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["anchor is policy"] == {"kl_sample": 0.0, "kl_sample_std": 0.0}
    assert metrics["balance"] == pytest.approx(balance_of(parallel, num_ranks, policy_dir))
    assert_close(load_file(tmp_path / "weights.safetensors"), reference["weights"], 1e-6)
    assert_close(load_file(tmp_path / "anchor.safetensors"), reference["average"], 1e-6)
