"""GLM-4-9B as it was released first: the function of glm.py under Megatron's old names, with fused tensors."""

from __future__ import annotations

from typing import Any

from megatron_t1.models import decoder
from megatron_t1.models.spec import HFConfig, ModelSpec, family
from megatron_t1.models.weight_map import GateUp, Rename, Vocab

_LAYER = "transformer.encoder.layers.{layer}."


@family("ChatGLMModel")
def chatglm(hf: HFConfig) -> ModelSpec:
    for name, supported in (
        ("add_bias_linear", False),
        ("apply_residual_connection_post_layernorm", False),
        ("attention_dropout", 0.0),
        ("hidden_dropout", 0.0),
        ("fp32_residual_connection", False),
        ("interleaved_qkv", False),
        ("original_rope", True),
        ("pre_seq_len", 0),
        ("quantization_bit", 0),
        ("multi_query_attention", True),
        ("post_layer_norm", True),
        ("rmsnorm", True),
        ("tie_word_embeddings", False),
    ):
        hf.only(name, supported)
    for name in (
        "apply_query_key_layer_scaling",  # divides by the layer's number what it multiplied before
        "attention_softmax_in_fp32",  # a matter of rounding
        "attn_implementation",
        "auto_map",
        "bias_dropout_fusion",
        "classifier_dropout",
        "num_hidden_layers",  # repeats num_layers
        "prefix_projection",  # of the pre_seq_len prefix
        "vocab_size",  # without the padding
    ):
        hf.get(name)
    sizes: dict[str, Any] = {
        "num_layers": hf.count("num_layers"),
        "hidden_size": hf.size("hidden_size"),
        "ffn_hidden_size": hf.size("ffn_hidden_size"),
        "num_attention_heads": hf.size("num_attention_heads"),
        "num_query_groups": hf.size("multi_query_group_num"),
        "kv_channels": hf.size("kv_channels"),
        "layernorm_epsilon": hf.number("layernorm_epsilon"),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": hf.flag("add_qkv_bias", False),
        "rotary_interleaved": True,
    }
    vocab_size = hf.size("padded_vocab_size")
    attention, mlp = _LAYER + "self_attention.", _LAYER + "mlp."
    return ModelSpec(
        architecture=hf.architecture,
        transformer=sizes,
        vocab_size=vocab_size,
        max_position_embeddings=hf.size("seq_length"),
        rotary_base=10000.0 * hf.number("rope_ratio", 1.0),
        rotary_fraction=0.5,
        tied_embeddings=False,
        carried=("transformer.rotary_pos_emb.inv_freq",),  # computed, but there
        weights={
            "embedding.word_embeddings.weight": Vocab("transformer.embedding.word_embeddings.weight", vocab_size),
            decoder.LAYER + "input_layernorm.weight": Rename(_LAYER + "input_layernorm.weight"),
            **decoder.qkv(sizes, (attention + "query_key_value",), bias=sizes["add_qkv_bias"]),
            decoder.LAYER + "self_attention.linear_proj.weight": Rename(attention + "dense.weight", tp_dim=1),
            decoder.LAYER + "pre_mlp_layernorm.weight": Rename(_LAYER + "post_attention_layernorm.weight"),
            decoder.LAYER + "mlp.linear_fc1.weight": GateUp((mlp + "dense_h_to_4h.weight",)),
            decoder.LAYER + "mlp.linear_fc2.weight": Rename(mlp + "dense_4h_to_h.weight", tp_dim=1),
            "decoder.final_layernorm.weight": Rename("transformer.encoder.final_layernorm.weight"),
            "output_layer.weight": Vocab("transformer.output_layer.weight", vocab_size),
        },
    )
