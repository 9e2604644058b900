"""What the families share: the sizes, switches and names of a decoder with grouped-query attention, SwiGLU and RMSNorm.

A family's file takes what it has of these, in the usual Hugging Face spelling, and says what is its own.
"""

from __future__ import annotations

from typing import Any

from megatron_t1.models.spec import HFConfig
from megatron_t1.models.weight_map import QKV, GateUp, Op, Rename, Vocab

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
HF_ATTENTION = HF_LAYER + "self_attn."


def fields(hf: HFConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig, but for what a family decides itself. Refuses another activation,
    dropout, and attention to later tokens."""
    hf.only("hidden_act", "silu")
    hf.only("attention_dropout", 0, 0.0)
    hf.only("is_causal", True)
    hidden, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{hf.origin}: hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}")
    groups = hf.size("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(
            f"{hf.origin}: num_attention_heads = {heads} must be a multiple of num_key_value_heads = {groups}"
        )
    return {
        "num_layers": hf.count("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": hf.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hf.size("head_dim", hidden // heads),
        "layernorm_epsilon": hf.number("rms_norm_eps"),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
    }


def embeddings(hf: HFConfig) -> dict[str, Any]:
    """The fields of a ModelSpec around the decoder."""
    return {
        "architecture": hf.architecture,
        "vocab_size": hf.size("vocab_size"),
        "tied_embeddings": hf.flag("tie_word_embeddings", False),
    }


def weights(hf: HFConfig) -> dict[str, Op]:
    """Embedding, head and norms, and the attention's output projection."""
    tied, vocab_size = hf.flag("tie_word_embeddings", False), hf.size("vocab_size")
    return {
        "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight", vocab_size),
        LAYER + "input_layernorm.weight": Rename(HF_LAYER + "input_layernorm.weight"),
        LAYER + "self_attention.linear_proj.weight": Rename(HF_ATTENTION + "o_proj.weight", tp_dim=1),
        LAYER + "pre_mlp_layernorm.weight": Rename(HF_LAYER + "post_attention_layernorm.weight"),
        "decoder.final_layernorm.weight": Rename("model.norm.weight"),
        # With tied embeddings Megatron keeps this copy on the last pipeline stage only.
        "output_layer.weight": Vocab("model.embed_tokens.weight" if tied else "lm_head.weight", vocab_size),
    }


def qkv(sizes: dict[str, Any], names: tuple[str, ...], *, bias: bool) -> dict[str, Op]:
    """The QKV projection, `names` being those of its Hugging Face modules (see `weight_map.QKV`)."""
    return {
        LAYER + f"self_attention.linear_qkv.{kind}": QKV(
            names=tuple(f"{name}.{kind}" for name in names),
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_query_groups"],
            head_dim=sizes["kv_channels"],
        )
        for kind in (("weight", "bias") if bias else ("weight",))
    }


def separate_qkv(sizes: dict[str, Any], *, bias: bool) -> dict[str, Op]:
    return qkv(sizes, tuple(f"{HF_ATTENTION}{part}_proj" for part in "qkv"), bias=bias)


def qk_norm() -> dict[str, Op]:
    """A norm of each head's query and key."""
    return {
        LAYER + f"self_attention.{part}_layernorm.weight": Rename(f"{HF_ATTENTION}{part}_norm.weight") for part in "qk"
    }


def mlp(ours: str = "mlp.", theirs: str = "mlp.") -> dict[str, Op]:
    """A SwiGLU layer with separate gate and up projections."""
    ours, theirs = LAYER + ours, HF_LAYER + theirs
    return {
        ours + "linear_fc1.weight": GateUp((theirs + "gate_proj.weight", theirs + "up_proj.weight")),
        ours + "linear_fc2.weight": Rename(theirs + "down_proj.weight", tp_dim=1),
    }


def experts() -> dict[str, Op]:
    """Routed experts, each a SwiGLU layer, and their router."""
    return {
        LAYER + "mlp.router.weight": Rename(HF_LAYER + "mlp.gate.weight"),
        **mlp("mlp.experts.{expert}.", "mlp.experts.{expert}."),
    }
