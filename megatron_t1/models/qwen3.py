"""Qwen3: a norm of each query and key in place of Qwen2's bias."""

from __future__ import annotations

from megatron_t1.models import decoder
from megatron_t1.models.qwen2 import refuse_sliding_window
from megatron_t1.models.spec import HFConfig, ModelSpec, family


@family("Qwen3ForCausalLM")
def qwen3(hf: HFConfig) -> ModelSpec:
    refuse_sliding_window(hf)
    hf.only("attention_bias", False)
    hf.only("use_qk_norm", True)
    sizes = decoder.fields(hf)
    return ModelSpec(
        **decoder.embeddings(hf),
        **hf.rotary(),
        transformer={**sizes, "qk_layernorm": True},
        weights={
            **decoder.weights(hf),
            **decoder.separate_qkv(sizes, bias=False),
            **decoder.qk_norm(),
            **decoder.mlp(),
        },
    )
