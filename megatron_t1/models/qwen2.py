"""Qwen2 and Qwen2.5: grouped-query attention with a bias on QKV, SwiGLU, RMSNorm, rotary embedding."""

from __future__ import annotations

from megatron_t1.models.spec import HFConfig, ModelSpec
from megatron_t1.weights.ops import QKV, GateUp, Op, Rename, Vocab


def qwen2(hf: HFConfig) -> ModelSpec:
    hidden, heads = hf.need("hidden_size"), hf.need("num_attention_heads")
    kv_heads = hf.get("num_key_value_heads", heads)
    head_dim = hf.get("head_dim", hidden // heads)
    vocab_size = hf.need("vocab_size")
    tied = bool(hf.get("tie_word_embeddings", False))
    hf.only("hidden_act", "silu")
    hf.only("use_sliding_window", False)
    hf.only("attention_dropout", 0, 0.0)
    hf.get("sliding_window")  # without effect while use_sliding_window is off
    if set(hf.get("layer_types", [])) - {"full_attention"}:
        raise ValueError(f"{hf.origin}: layer_types has kinds other than full_attention")

    layer, there = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention, mlp = there + "self_attn.", there + "mlp."
    weights: dict[str, Op] = {
        "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight", vocab_size),
        layer + "input_layernorm.weight": Rename(there + "input_layernorm.weight"),
        layer + "self_attention.linear_proj.weight": Rename(attention + "o_proj.weight", tp_dim=1),
        layer + "pre_mlp_layernorm.weight": Rename(there + "post_attention_layernorm.weight"),
        layer + "mlp.linear_fc1.weight": GateUp(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
        layer + "mlp.linear_fc2.weight": Rename(mlp + "down_proj.weight", tp_dim=1),
        "decoder.final_layernorm.weight": Rename("model.norm.weight"),
        # With tied embeddings Megatron keeps this copy on the last pipeline stage only.
        "output_layer.weight": Vocab("model.embed_tokens.weight" if tied else "lm_head.weight", vocab_size),
    }
    for kind in ("weight", "bias"):
        q, k, v = (f"{attention}{part}_proj.{kind}" for part in "qkv")
        weights[layer + f"self_attention.linear_qkv.{kind}"] = QKV(
            q=q, k=k, v=v, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
        )
    return ModelSpec(
        architecture=hf.architecture,
        transformer={
            "num_layers": hf.need("num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": hf.need("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": kv_heads,
            "kv_channels": head_dim,
            "layernorm_epsilon": hf.need("rms_norm_eps"),
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": True,
        },
        vocab_size=vocab_size,
        max_position_embeddings=hf.need("max_position_embeddings"),
        rotary_base=hf.rope_theta(),
        tied_embeddings=tied,
        weights=weights,
    )
