"""A model family: Llama's decoder is Qwen2's without biases. transformers and vLLM know it already."""

from __future__ import annotations

from megatron_t1.models import decoder
from megatron_t1.models.spec import HFConfig, ModelSpec, family


@family("LlamaForCausalLM")
def llama(hf: HFConfig) -> ModelSpec:
    hf.only("attention_bias", False)
    hf.only("mlp_bias", False)
    hf.only("attention_dropout", 0.0)
    sizes = decoder.fields(hf)
    return ModelSpec(
        **decoder.embeddings(hf),
        **hf.rotary(),
        transformer=sizes,
        weights={**decoder.weights(hf), **decoder.separate_qkv(sizes, bias=False), **decoder.mlp()},
    )
