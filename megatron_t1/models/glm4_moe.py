"""GLM-4.5 and 4.6: dense first layers, then routed experts beside shared ones, chosen by sigmoid scores and a bias."""

from __future__ import annotations

from typing import Any

from megatron_t1.models import decoder
from megatron_t1.models.spec import HFConfig, ModelSpec, family
from megatron_t1.models.weight_map import Op, Rename


@family("Glm4MoeForCausalLM")
def glm4_moe(hf: HFConfig) -> ModelSpec:
    hf.only("output_router_logits", False)
    hf.get("router_aux_loss_coef")  # without effect while output_router_logits is off
    sizes = decoder.fields(hf)
    bias, qk_norm = hf.flag("attention_bias", False), hf.flag("use_qk_norm", False)
    num_dense, num_layers = hf.count("first_k_dense_replace", least=0), hf.count("num_hidden_layers")
    weights: dict[str, Op] = {
        **decoder.weights(hf),
        **decoder.separate_qkv(sizes, bias=bias),
        **(decoder.qk_norm() if qk_norm else {}),
        **decoder.mlp(),
        **decoder.experts(),
        **decoder.mlp("mlp.shared_experts.", "mlp.shared_experts."),
        decoder.LAYER + "mlp.router.expert_bias": Rename(decoder.HF_LAYER + "mlp.gate.e_score_correction_bias"),
    }
    # The layers that predict further tokens at once are for speculative decoding: training leaves them as they are.
    num_extra = max(hf.count("num_nextn_predict_layers", 0, least=0), hf.count("num_mtp_layers", 0, least=0))
    return ModelSpec(
        **decoder.embeddings(hf),
        **hf.rotary(fraction=0.5),
        transformer={
            **sizes,
            "add_qkv_bias": bias,
            "qk_layernorm": qk_norm,
            "moe_layer_freq": [int(layer >= num_dense) for layer in range(num_layers)],
            "moe_ffn_hidden_size": hf.size("moe_intermediate_size"),
            "moe_shared_expert_intermediate_size": hf.size("moe_intermediate_size") * hf.count("n_shared_experts"),
            **_routing(hf),
        },
        carried=tuple(f"model.layers.{num_layers + extra}." for extra in range(num_extra)),
        weights=weights,
    )


def _routing(hf: HFConfig) -> dict[str, Any]:
    top_k, num_groups, top_groups = hf.size("num_experts_per_tok"), hf.size("n_group", 1), hf.size("topk_group", 1)
    if not hf.flag("norm_topk_prob", True) or top_k == 1:
        raise ValueError(
            f"{hf.origin}: norm_topk_prob = {hf.get('norm_topk_prob')} with num_experts_per_tok = {top_k} is not "
            "supported: Megatron normalises the sigmoid scores of more than one expert, and only those"
        )
    # Megatron ranks groups by their best top_k / top_groups experts, GLM by their best two.
    if num_groups > 1 and top_k // top_groups != 2:
        raise ValueError(
            f"{hf.origin}: n_group = {num_groups} is supported with num_experts_per_tok = 2 x topk_group only; they "
            f"are {top_k} and {top_groups}"
        )
    return {
        "num_moe_experts": hf.count("n_routed_experts"),
        "moe_router_topk": top_k,
        "moe_router_num_groups": num_groups if num_groups > 1 else None,
        "moe_router_group_topk": top_groups if num_groups > 1 else None,
        "moe_router_topk_scaling_factor": hf.number("routed_scaling_factor", 1.0),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    }
