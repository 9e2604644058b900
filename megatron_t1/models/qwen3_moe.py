"""Qwen3 mixtures of experts: Qwen3 with routed experts in place of the MLP, in all layers or some."""

from __future__ import annotations

from megatron_t1.models import decoder
from megatron_t1.models.qwen2 import refuse_sliding_window
from megatron_t1.models.spec import HFConfig, ModelSpec, family


@family("Qwen3MoeForCausalLM")
def qwen3_moe(hf: HFConfig) -> ModelSpec:
    refuse_sliding_window(hf)
    hf.only("attention_bias", False)
    hf.only("use_qk_norm", True)
    hf.only("output_router_logits", False)
    hf.get("router_aux_loss_coef")  # without effect while output_router_logits is off
    sizes = decoder.fields(hf)
    top_k, normalised = hf.size("num_experts_per_tok"), hf.flag("norm_topk_prob", False)
    if top_k == 1 and normalised:
        raise ValueError(
            f"{hf.origin}: norm_topk_prob = True with num_experts_per_tok = 1 is not supported: the one expert's score "
            "would be 1 whatever the router says"
        )
    return ModelSpec(
        **decoder.embeddings(hf),
        **hf.rotary(),
        transformer={
            **sizes,
            "qk_layernorm": True,
            "moe_layer_freq": _sparse_layers(hf),
            "num_moe_experts": hf.count("num_experts", hf.get("num_local_experts")),
            "moe_ffn_hidden_size": hf.size("moe_intermediate_size"),
            "moe_router_topk": top_k,
            # The softmax over the chosen experts only is the softmax over all of them, normalised again.
            "moe_router_pre_softmax": not normalised,
        },
        weights={
            **decoder.weights(hf),
            **decoder.separate_qkv(sizes, bias=False),
            **decoder.qk_norm(),
            **decoder.mlp(),
            **decoder.experts(),
        },
    )


def _sparse_layers(hf: HFConfig) -> int | list[int]:
    """Megatron's `moe_layer_freq`: 1 where all layers have experts, else 1 or 0 for each."""
    num_layers, step = hf.count("num_hidden_layers"), hf.size("decoder_sparse_step", 1)
    dense = set(hf.places("mlp_only_layers"))
    sparse = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(num_layers)]
    if not any(sparse):
        raise ValueError(
            f"{hf.origin}: decoder_sparse_step = {step} and mlp_only_layers = {sorted(dense)} leave no experts"
        )
    return 1 if all(sparse) else sparse
