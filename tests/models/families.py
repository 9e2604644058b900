"""A tiny checkpoint of every family, and transformers' numbers for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine.batch import make_sequences
from tests.tiny import make_tiny

VOCAB = 321  # odd: padded to TP in Megatron
_make = partial(make_tiny, vocab_size=VOCAB, init_std=0.1, num_hidden_layers=4)


def _glm4_moe_with_extra_layer(folder: Path, **fields) -> Path:
    """With a layer that predicts a further token, as the releases have it; transformers neither writes nor reads it."""
    _make("Glm4MoeForCausalLM", folder, num_mtp_layers=1, use_qk_norm=False, **fields)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    tensors |= {f"model.layers.4.{name}.weight": embedding + 1 for name in ("embed_tokens", "shared_head.head")}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen2": partial(_make, "Qwen2ForCausalLM"),
    "qwen2 tied": partial(_make, "Qwen2ForCausalLM", tied=True),
    "qwen3": partial(_make, "Qwen3ForCausalLM"),
    "qwen3 tied": partial(_make, "Qwen3ForCausalLM", tied=True),
    "qwen3_moe": partial(_make, "Qwen3MoeForCausalLM"),
    "qwen3_moe dense layer": partial(_make, "Qwen3MoeForCausalLM", norm_topk_prob=False, mlp_only_layers=[1]),
    "glm": partial(_make, "GlmForCausalLM"),
    "glm4": partial(_make, "Glm4ForCausalLM"),
    "glm4 bias": partial(_make, "Glm4ForCausalLM", attention_bias=True),
    "glm4_moe": partial(
        _make, "Glm4MoeForCausalLM", n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2
    ),
    "glm4_moe extra layer": _glm4_moe_with_extra_layer,
}
MOE = {name for name in FAMILIES if "moe" in name}


def reference(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """transformers in float64, sequence by sequence: the logits that predict each response, by sample number, and the
    gradients of the mean cross-entropy over all response tokens, by checkpoint name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    sequences = make_sequences(VOCAB)
    count = sum(len(s.response_ids) for s in sequences)
    logits = {}
    for number, s in enumerate(sequences):
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])
        predicted = model(ids[None]).logits[0, len(s.prompt_ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(predicted, torch.tensor(s.response_ids), reduction="sum")
        (loss / count).backward()
        logits[str(number)] = predicted.detach()
    return logits, expert_names({name: p.grad for name, p in model.named_parameters()})


def expert_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers >= 5 stacks the experts of a layer in memory; checkpoints have them one by one."""
    named = {}
    for name, tensor in tensors.items():
        prefix, found, kind = name.partition("mlp.experts.")
        if not found:
            named[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True) if "gate" in kind else [(kind, matrix)]
            named |= {f"{prefix}{found}{expert}.{part}.weight": value for part, value in parts}
    return named
