"""Qwen2 and Qwen2.5: a bias on QKV."""

from __future__ import annotations

from megatron_t1.models import decoder
from megatron_t1.models.spec import HFConfig, ModelSpec, family


def refuse_sliding_window(hf: HFConfig) -> None:
    hf.only("use_sliding_window", False)
    hf.get("sliding_window")  # without effect while use_sliding_window is off
    if other := sorted(set(hf.names("layer_types")) - {"full_attention"}):
        raise ValueError(f"{hf.origin}: layer_types has {other!s:.200}; only full_attention is supported")


@family("Qwen2ForCausalLM")
def qwen2(hf: HFConfig) -> ModelSpec:
    refuse_sliding_window(hf)
    sizes = decoder.fields(hf)
    return ModelSpec(
        **decoder.embeddings(hf),
        **hf.rotary(),
        transformer={**sizes, "add_qkv_bias": True},
        weights={**decoder.weights(hf), **decoder.separate_qkv(sizes, bias=True), **decoder.mlp()},
    )
