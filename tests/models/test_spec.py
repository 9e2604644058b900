"""config.json is the source: those of the releases are read, and what would change the function is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_t1.models import spec_of

RELEASED = json.loads(Path(__file__).with_name("released_configs.json").read_text())
READ = {  # rotary base and share, KV heads, carried layers, mixture of experts
    "Qwen2.5-32B": (1e6, 1.0, 8, (), None),
    "Qwen3-32B": (1e6, 1.0, 8, (), None),
    "Qwen3-30B-A3B": (1e6, 1.0, 4, (), {"num_moe_experts": 128, "moe_layer_freq": 1, "moe_router_pre_softmax": False}),
    "glm-4-9b-hf": (5e6, 0.5, 2, (), None),
    "glm-4-9b-chat": (5e6, 0.5, 2, ("transformer.rotary_pos_emb.inv_freq",), None),
    "GLM-4-32B-0414": (1e4, 0.5, 2, (), None),
    "GLM-4.5": (1e6, 0.5, 8, ("model.layers.92.",), {
        "num_moe_experts": 160, "moe_layer_freq": [0] * 3 + [1] * 89, "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 1536, "moe_router_num_groups": None, "qk_layernorm": True,
    }),
}  # fmt: skip


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""As the model cards of Qwen2.5 and Qwen3 have it."""


def read(folder: Path, fields: dict):
    (folder / "config.json").write_text(json.dumps(fields))
    return spec_of(folder)


@pytest.mark.parametrize("release", RELEASED)
def test_released_configs_are_read(release, tmp_path):
    spec = read(tmp_path, RELEASED[release])
    base, fraction, kv_heads, carried, experts = READ[release]
    assert (spec.rotary_base, spec.rotary_fraction) == (base, fraction)
    assert spec.transformer["num_query_groups"] == kv_heads
    assert spec.carried == carried
    assert ("num_moe_experts" in spec.transformer) == (experts is not None)
    assert {name: spec.transformer[name] for name in experts or {}} == (experts or {})


@pytest.mark.parametrize("release", ["Qwen2.5-32B", "Qwen3-32B", "glm-4-9b-hf", "GLM-4.5"])
def test_yarn_reaches_further(release, tmp_path):
    plain = read(tmp_path, RELEASED[release])
    stretched = read(tmp_path, {**RELEASED[release], "rope_scaling": YARN})
    assert stretched.max_position_embeddings == 131_072
    assert stretched.yarn.scale == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert replace(stretched, max_position_embeddings=plain.max_position_embeddings, yarn=None) == plain
    of_transformers_5 = {**YARN, "rope_type": "yarn", "rope_theta": RELEASED[release]["rope_theta"]}
    assert read(tmp_path, {**RELEASED[release], "rope_parameters": of_transformers_5}) == stretched


@pytest.mark.parametrize(
    ("release", "change", "message"),
    [
        ("Qwen2.5-32B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn.* lacks original_max_position_embed"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "factor": 0.5}}, "factor must be at least 1"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "beta_fast": 1}}, "beta_fast above beta_slow"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "factor": 1e9}}, "below 2147483648"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "original_max_position_embeddings": 0.1}}, "a whole number"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "rope_type": "default"}}, "'default' contradicts .*'yarn'"),
        ("Qwen2.5-32B", {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta = 1.0 must be above 1"),
        ("GLM-4.5", {"partial_rotary_factor": 2.0}, "partial_rotary_factor = 2.0 at most 1"),
        ("Qwen2.5-32B", {"rope_scaling": {"type": "default"}, "rope_parameters": YARN}, "say all in rope_parameters"),
        ("Qwen2.5-32B", {"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale.* is not supported: the plain .* and yarn"),
        *(("Qwen3-32B", {"rope_scaling": {"rope_type": kind, "factor": 4.0}}, f"'{kind}'.* is not supported: the plain")
          for kind in ("linear", "dynamic", "llama3", "longrope")),
        ("Qwen3-32B", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, "say all in rope_parameters"),
        ("Qwen3-32B", {"rope_parameters": {"rope_theta": 2.0}}, "rope_theta = 1000000 contradicts rope_parameters"),
        ("Qwen2.5-32B", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("Qwen3-32B", {"layer_types": ["sliding_attention"]}, r"layer_types has \['sliding_attention'\]"),
        ("Qwen3-32B", {"attention_bias": True}, "attention_bias = True"),
        ("Qwen3-32B", {"use_qk_norm": False}, "use_qk_norm = False is not supported"),
        ("Qwen3-32B", {"new_switch": 3}, "does not know and that may matter: new_switch = 3"),
        ("Qwen3-30B-A3B", {"output_router_logits": True}, "output_router_logits = True"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1}, "norm_topk_prob = True with num_experts_per_tok = 1"),
        ("Qwen2.5-32B", {"num_key_value_heads": 7}, "num_attention_heads = 40 .* multiple of num_key_value_heads = 7"),
        ("GLM-4.5", {"num_key_value_heads": 192}, "num_attention_heads = 96 .* num_key_value_heads = 192"),
        ("Qwen3-32B", {"quantization_config": {"quant_method": "fp8"}}, "'fp8'}: .* take the release that is not quan"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 99}, "decoder_sparse_step = 99 .* leave no experts"),
        ("glm-4-9b-chat", {"original_rope": False}, "original_rope = False"),
        ("glm-4-9b-chat", {"quantization_bit": 4}, "quantization_bit = 4"),
        ("GLM-4.5", {"norm_topk_prob": False}, "norm_topk_prob = False with num_experts_per_tok = 8"),
        ("GLM-4.5", {"n_group": 8, "topk_group": 2}, "n_group = 8 .* they are 8 and 2"),
        *((release, {"is_causal": False}, "is_causal = False is not supported")
          for release in ("Qwen2.5-32B", "Qwen3-32B", "Qwen3-30B-A3B", "glm-4-9b-hf", "GLM-4-32B-0414", "GLM-4.5")),
        ("GLM-4.5", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("GLM-4.5", {"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is not known; known: ChatGLM"),
    ],
)  # fmt: skip
def test_what_changes_the_function_is_refused(release, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**RELEASED[release], **change})


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation_autoset": True},
        {"unsloth_fixed": True, "unsloth_version": "2024.9"},
        {"tokenizer_class": "Qwen2Tokenizer", "pretraining_tp": 1},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1, "max_length": 20, "length_penalty": 1.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1000000.0}},
        {"rope_scaling": {"type": "default"}},
        {"is_causal": True},
    ],
)
def test_what_changes_nothing_is_read_over(fields, tmp_path):
    plain = read(tmp_path, RELEASED["Qwen2.5-32B"])
    assert read(tmp_path, {**RELEASED["Qwen2.5-32B"], **fields}) == plain


@pytest.mark.parametrize("release", ["Qwen3-32B", "Qwen3-30B-A3B"])
def test_qwen3_coder_says_what_qwen3_is(release, tmp_path):
    fields = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert read(tmp_path, {**RELEASED[release], **fields}) == read(tmp_path, RELEASED[release])


@pytest.mark.parametrize(
    "fields",
    [
        {"pretraining_tp": 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_what_looks_like_it_but_changes_something_is_refused(fields, tmp_path):
    with pytest.raises(ValueError, match=next(iter(fields)).split("_")[0]):
        read(tmp_path, {**RELEASED["Qwen2.5-32B"], **fields})
