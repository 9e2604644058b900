"""The weight map on random sizes and layouts, without ranks: the parts of all of them make up every Hugging Face tensor
exactly once and byte for byte, and these are the tensors that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_t1.engine.config import ParallelConfig
from megatron_t1.models.spec import FAMILIES, HFConfig, ModelSpec
from megatron_t1.models.weight_map import QKV, GateUp, Op, Piece, Rename, Shard, Vocab
from megatron_t1.weights.plan import Plan
from tests.models.families import chatglm_config, chatglm_names, expert_names
from tests.tiny import ARCHITECTURES


@st.composite
def models(draw) -> tuple[str, dict[str, Any]]:
    architecture = draw(st.sampled_from([*sorted(ARCHITECTURES), "ChatGLMModel"]))
    known = "GlmForCausalLM" if architecture == "ChatGLMModel" else architecture
    kv_heads = draw(st.integers(1, 4))
    num_layers = draw(st.integers(1, 5))
    fields = {
        **ARCHITECTURES[known],
        "pad_token_id": 0,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": 2 * draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(1, 3)) * 12,
        "intermediate_size": 12 * draw(st.integers(1, 2)),
        "vocab_size": draw(st.integers(5, 17)),
        "tie_word_embeddings": architecture != "ChatGLMModel" and draw(st.booleans()),
    }
    if "moe_intermediate_size" in fields:
        fields["moe_intermediate_size"] = 12 * draw(st.integers(1, 2))
    if "num_experts" in fields and num_layers > 1:
        fields["mlp_only_layers"] = [draw(st.integers(0, num_layers - 1))]
    if "first_k_dense_replace" in fields:
        fields["first_k_dense_replace"] = draw(st.integers(0, num_layers - 1))
    return architecture, fields


@st.composite
def layouts(draw, spec: ModelSpec) -> ParallelConfig:
    sizes = spec.transformer
    tensor = draw(st.sampled_from([
        n for n in (1, 2, 3, 4) if sizes["num_attention_heads"] % n == 0
        and (sizes["num_query_groups"] % n == 0 or n % sizes["num_query_groups"] == 0)
        and (sizes["num_attention_heads"] + 2 * sizes["num_query_groups"]) * sizes["kv_channels"] % n == 0
    ]))  # fmt: skip
    pipeline = draw(st.integers(1, min(3, sizes["num_layers"])))
    virtual = draw(st.sampled_from([1, 2])) if 1 < pipeline <= sizes["num_layers"] // 2 else 1
    experts = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    expert, expert_tensor = experts if "num_moe_experts" in sizes else (1, 0)
    return ParallelConfig(
        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert, expert_tensor=expert_tensor
    )


def local_shape(name: str, op: Op, spec: ModelSpec, tp: int) -> tuple[int, ...]:
    """Of a Megatron parameter on one of `tp` ranks."""
    sizes = spec.transformer
    hidden, heads, head_dim = sizes["hidden_size"], sizes["num_attention_heads"], sizes["kv_channels"]
    kind = next((kind for kind in ("experts.{", "shared_experts") if kind in name), "")
    ffn = {
        "": "ffn_hidden_size", "experts.{": "moe_ffn_hidden_size",
        "shared_experts": "moe_shared_expert_intermediate_size",
    }[kind]  # fmt: skip
    match op:
        case QKV():
            rows = (heads + 2 * sizes["num_query_groups"]) * head_dim // tp
            return (rows, hidden) if name.endswith("weight") else (rows,)
        case GateUp():
            return (2 * sizes[ffn] // tp, hidden)
        case Vocab():
            return (-(-spec.vocab_size // tp), hidden)
        case Rename(tp_dim=1):
            return (hidden, (heads * head_dim if "linear_proj" in name else sizes[ffn]) // tp)
        case Rename():
            if "router" in name:
                return (sizes["num_moe_experts"], hidden)[: 1 if "bias" in name else 2]
            return (head_dim if "q_layernorm" in name or "k_layernorm" in name else hidden,)


def all_pieces(spec: ModelSpec, parallel: ParallelConfig) -> list[Piece]:
    """Of every rank of a layout, over parameters of its own."""
    sizes, pieces = spec.transformer, []
    frequency = sizes.get("moe_layer_freq", 0)
    stages = parallel.layers_of_stages(sizes["num_layers"])
    num_experts, expert_tensor = sizes.get("num_moe_experts", 0), parallel.expert_tensor or parallel.tensor
    assert len(stages) == parallel.num_stages
    layers = range(sum(stages))
    for name, op in spec.weights.items():
        is_sparse = any(part in name for part in ("router", "experts"))
        for layer in layers if "{layer}" in name else [0]:
            sparse_layer = frequency[layer] if isinstance(frequency, list) else frequency
            if ("mlp.linear" in name and sparse_layer) or (is_sparse and not sparse_layer):
                continue
            cut = expert_tensor if "{expert}" in name else parallel.tensor
            for expert in range(num_experts) if "{expert}" in name else [0]:
                for rank in range(cut):
                    param = torch.empty(local_shape(name, op, spec, cut), dtype=torch.bfloat16)
                    pieces += op.pieces(param, Shard(rank, cut), {"layer": layer, "expert": expert})
    return pieces


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_parts_of_all_ranks_make_up_the_checkpoint(data):
    architecture, fields = data.draw(models())
    known = "GlmForCausalLM" if architecture == "ChatGLMModel" else architecture
    model_class = getattr(transformers, known)
    config = model_class.config_class(**fields)
    config.architectures = [architecture]
    with torch.device("meta"):
        model = model_class(config)
    kept = {n: t for n, t in model.state_dict().items() if not (config.tie_word_embeddings and n == "lm_head.weight")}
    wanted = expert_names(kept)
    described = config.to_dict()
    if architecture == "ChatGLMModel":
        wanted, described = chatglm_names(wanted), chatglm_config({"dtype": "float32", **described})
    spec = FAMILIES[architecture](HFConfig(described, "config.json"))
    pieces = all_pieces(spec, data.draw(layouts(spec)))

    bits = {name: torch.randint(-(2**15), 2**15, t.shape, dtype=torch.int16) for name, t in wanted.items()}
    for piece in pieces:
        assert piece.shape == tuple(bits[piece.name].shape), piece.name
        piece.view.view(torch.int16).copy_(bits[piece.name][piece.index].reshape(piece.view.shape))
    made = dict(Plan(pieces).gather())  # refuses what is not covered exactly once
    assert made.keys() == bits.keys()
    for name, expected in bits.items():
        assert torch.equal(made[name].view(torch.int16), expected), name


@pytest.mark.parametrize(
    ("fields", "num_layers", "expected"),
    [
        ({"pipeline": 4}, 46, (11, 12, 12, 11)),
        ({"pipeline": 2}, 61, (31, 30)),
        ({"pipeline": 2, "virtual_pipeline": 2}, 5, (1, 2, 1, 1)),
        ({"pipeline": 2, "pipeline_layers": (3, 1)}, 4, (3, 1)),
    ],
)
def test_layers_are_spread_over_stages(fields, num_layers, expected):
    assert ParallelConfig(**fields).layers_of_stages(num_layers) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"virtual_pipeline": 2}, "virtual_pipeline = 2 needs parallel.pipeline > 1"),
        ({"pipeline": 2, "pipeline_layers": (3,)}, r"pipeline_layers = \[3\] must be 2 numbers above 0"),
        ({"pipeline": 2, "pipeline_layers": (4, 0)}, r"pipeline_layers = \[4, 0\] must be 2 numbers above 0"),
        ({"expert": 0}, "expert = 0 must be at least 1"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 3, "sequence_parallel": True}, "num_attention_heads = 4 does not divide by parallel.tensor = 3"),
        ({"tensor": 3, "sequence_parallel": True}, "num_query_groups = 2 neither divides parallel.tensor = 3 nor"),
        ({"tensor": 2}, "a mixture of experts with parallel.tensor = 2 needs parallel.sequence_parallel = true"),
        ({"expert": 3}, "num_moe_experts = 4 does not divide by parallel.expert = 3"),
        ({"expert_tensor": 2}, "expert_tensor = 2 beside parallel.tensor = 1 needs parallel.expert above 1"),
        ({"expert_tensor": 5}, "moe_ffn_hidden_size = 64 does not divide by parallel.expert_tensor = 5"),
        ({"pipeline": 3}, "2 layers are too few for parallel.pipeline x parallel.virtual_pipeline = 3 x 1"),
        ({"pipeline": 2, "pipeline_layers": (2, 1)}, r"pipeline_layers = \[2, 1\] are 3 layers, the model has 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(fields, message):
    from megatron_t1.engine.layout import check_divisible

    config = transformers.Qwen3MoeConfig(
        **ARCHITECTURES["Qwen3MoeForCausalLM"], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    spec = FAMILIES["Qwen3MoeForCausalLM"](HFConfig(config.to_dict(), "config.json"))
    with pytest.raises(ValueError, match=message):
        check_divisible(spec, ParallelConfig(**fields))
