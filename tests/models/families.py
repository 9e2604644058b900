"""A tiny checkpoint of every family, and transformers' numbers for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

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


def _chatglm(folder: Path, **fields) -> Path:
    """A GLM under the names of the first release, which transformers does not know."""
    _make("GlmForCausalLM", folder, **fields)
    tensors = chatglm_names(load_file(folder / "model.safetensors"))
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.arange(8.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = chatglm_config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
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
    "chatglm": _chatglm,
}
MOE = {name for name in FAMILIES if "moe" in name}

# Trained on 32 positions, which the longest of the batch exceed; so small a base that every kind of frequency is there.
_YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
    "beta_slow": 0.5,
}  # fmt: skip


def _as_qwen_documents_it(folder: Path) -> Path:
    """In fields of transformers 4, as one adds them to a released config.json by hand."""
    _make("Qwen2ForCausalLM", folder, rope_parameters=_YARN, max_position_embeddings=256)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    scaling = {name: value for name, value in _YARN.items() if name not in ("rope_type", "rope_theta")}
    path.write_text(json.dumps({**config, "rope_theta": 100.0, "rope_scaling": {"type": "yarn", **scaling}}))
    return folder


YARN: dict[str, Callable[..., Path]] = {
    "qwen2 yarn": _as_qwen_documents_it,
    **{
        f"{family} yarn": partial(FAMILIES[family], rope_parameters={**_YARN, **more}, max_position_embeddings=256)
        for family, more in {
            "qwen3": {"attention_factor": 1.5},
            "qwen3_moe": {},
            "glm": {"partial_rotary_factor": 0.5},
            "glm4": {"partial_rotary_factor": 0.5},
            "glm4_moe": {"partial_rotary_factor": 0.5},
        }.items()
    },
}
"""Every family that can be stretched, beyond the positions that it was trained on."""


def load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model of a folder."""
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["ChatGLMModel"]:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    named = {theirs: glm for glm, theirs in CHATGLM_CONFIG.items()}
    model = GlmForCausalLM(GlmConfig(**{named[name]: value for name, value in config.items() if name in named}))
    tensors = load_file(folder / "model.safetensors")
    rows, kv_rows = (
        config[heads] * config["kv_channels"] for heads in ("num_attention_heads", "multi_query_group_num")
    )
    cuts = {"q": slice(0, rows), "k": slice(rows, rows + kv_rows), "v": slice(rows + kv_rows, None)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = tensors[chatglm_name(name)]
            if "query_key_value" in chatglm_name(name):
                source = source[cuts[name.split(".")[-2][0]]]
            parameter.copy_(source)
    return model.to(dtype)


def reference(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """transformers in float64, sequence by sequence: the logits that predict each response, by sample number, and the
    gradients of the mean cross-entropy over all response tokens, by checkpoint name."""
    model = load_model(folder, torch.float64)
    sequences = make_sequences(VOCAB)
    count = sum(len(s.response_ids) for s in sequences)
    logits = {}
    for number, s in enumerate(sequences):
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])
        predicted = model(ids[None]).logits[0, len(s.prompt_ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(predicted, torch.tensor(s.response_ids), reduction="sum")
        (loss / count).backward()
        logits[str(number)] = predicted.detach()
    gradients = expert_names({name: p.grad for name, p in model.named_parameters()})
    is_chatglm = "ChatGLMModel" in (folder / "config.json").read_text()
    return logits, chatglm_names(gradients) if is_chatglm else gradients


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


# GlmConfig's name of a field -> ChatGLM's.
CHATGLM_CONFIG = {
    "intermediate_size": "ffn_hidden_size", "hidden_size": "hidden_size", "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon", "num_key_value_heads": "multi_query_group_num",
    "num_attention_heads": "num_attention_heads", "num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length", "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id",
}  # fmt: skip


def chatglm_config(glm: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "attn_implementation": "sdpa",
        "bias_dropout_fusion": True, "classifier_dropout": None, "fp32_residual_connection": False,
        "hidden_dropout": 0.0, "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 1,
        "multi_query_attention": True, "use_cache": True, "tie_word_embeddings": False, "torch_dtype": glm["dtype"],
        "num_hidden_layers": glm["num_hidden_layers"],
        **{theirs: glm[name] for name, theirs in CHATGLM_CONFIG.items()},
    }  # fmt: skip


def chatglm_name(name: str) -> str:
    """Where a tensor of GlmForCausalLM is in the first release; q, k and v are in one."""
    for part in ("k_proj", "v_proj"):
        name = name.replace(part, "q_proj")
    for ours, theirs in (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.layers", "transformer.encoder.layers"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.q_proj", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ):
        name = name.replace(ours, theirs)
    return name


def chatglm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a GlmForCausalLM as the first release named and fused them."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=lambda name: ("v_proj" in name, "k_proj" in name)):  # q, k, v
        parts.setdefault(chatglm_name(name), []).append(tensors[name])
    return {name: torch.cat(found) for name, found in parts.items()}
