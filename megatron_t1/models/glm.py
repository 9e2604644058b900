"""GLM-4-9B as transformers has it: half of each head rotated, neighbours in pairs; gate and up in one tensor."""

from __future__ import annotations

from typing import Any

from megatron_t1.models import decoder
from megatron_t1.models.spec import HFConfig, ModelSpec, family
from megatron_t1.models.weight_map import GateUp, Op


@family("GlmForCausalLM")
def glm(hf: HFConfig) -> ModelSpec:
    fields = glm_fields(hf)
    return ModelSpec(**fields, **decoder.embeddings(hf), **hf.rotary(fraction=0.5))


def glm_fields(hf: HFConfig) -> dict[str, Any]:
    """`transformer` and `weights` of the dense GLM decoder."""
    sizes = decoder.fields(hf)
    bias = hf.flag("attention_bias", True)
    weights: dict[str, Op] = {
        **decoder.weights(hf),
        **decoder.separate_qkv(sizes, bias=bias),
        **decoder.mlp(),
        decoder.LAYER + "mlp.linear_fc1.weight": GateUp((decoder.HF_LAYER + "mlp.gate_up_proj.weight",)),
    }
    return {
        "transformer": {**sizes, "add_qkv_bias": bias, "rotary_interleaved": True},
        "weights": weights,
    }
