"""FP8 takes its scales from the tensors themselves: nothing that a checkpoint would have to hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size

from megatron_t1.engine.config import FP8_MULTIPLES, ModelConfig, ParallelConfig
from megatron_t1.engine.layout import check_divisible
from megatron_t1.engine.model import build_model, transformer_config
from megatron_t1.fields import FieldError
from megatron_t1.models import spec_of
from megatron_t1.platform.detect import Platform
from tests.forks import ROOT

H100 = Platform(name="cuda", device=torch.device("cuda"), backend="nccl", transformer_engine="2.11.0", apex=False)


@pytest.mark.parametrize(
    ("fields", "recipe"),
    [({"fp8": "hybrid"}, "tensorwise"), ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, "blockwise")],
)
def test_the_recipe_is_stateless(fields: dict[str, str], recipe: str, tiny_dir: Path) -> None:
    # Megatron refuses fused RoPE where Transformer Engine is not installed.
    model = ModelConfig(hf_path=str(tiny_dir), transformer={**fields, "apply_rope_fusion": False})
    config = transformer_config(model, spec_of(tiny_dir), ParallelConfig(), H100)
    assert (config.fp8, config.fp8_recipe) == (fields["fp8"], recipe)


def test_delayed_scaling_is_refused() -> None:
    with pytest.raises(FieldError, match=r"transformer.fp8_recipe = 'delayed' must be tensorwise .* resumed run"):
        ModelConfig(transformer={"fp8": "hybrid", "fp8_recipe": "delayed"})


@pytest.mark.parametrize(("transformer_engine", "layers"), [(None, "auto"), ("2.11.0", "local")])
def test_fp8_without_transformer_engines_layers_is_refused(
    transformer_engine: str | None, layers: Literal["auto", "local"], tiny_dir: Path
) -> None:
    """Megatron's own layers would train without FP8 and say nothing."""
    platform = replace(H100, transformer_engine=transformer_engine)
    model = ModelConfig(hf_path=str(tiny_dir), layers=layers, transformer={"fp8": "hybrid", "apply_rope_fusion": False})
    with pytest.raises(ValueError, match="fp8 = hybrid needs Transformer Engine"):
        build_model(model, spec_of(tiny_dir), ParallelConfig(), platform)


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_ranks_have_as_many_tokens_as_megatron_aligns_to(recipe: str) -> None:
    model = ModelConfig(transformer={"fp8": "e4m3", "fp8_recipe": recipe})
    assert ParallelConfig(tensor=4).multiple_of_rank(model) == 4 * get_fp8_align_size(recipe)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fp8": True}, "transformer.fp8 = True must be e4m3, or hybrid"),
        ({"fp8": "e5m2"}, "transformer.fp8 = 'e5m2' must be e4m3, or hybrid"),
        ({"fp8": "hybrid", "fp8_recipe": "custom"}, "transformer.fp8_recipe = 'custom' must be tensorwise"),
        ({"fp8": "hybrid", "fp8_recipe": "block_wise"}, "transformer.fp8_recipe = 'block_wise' must be tensorwise"),
    ],
)
def test_what_megatron_would_refuse_in_the_first_forward_pass_is_refused_at_once(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(FieldError, match=said):
        ModelConfig(transformer=fields)


@pytest.mark.parametrize(
    ("more", "layout", "refused"),
    [
        ({}, {"tensor": 8}, r"fp8: ffn_hidden_size = 1368 of a rank is no multiple of 16, lower parallel.tensor"),
        ({}, {"tensor": 4}, None),
        ({"fp8_recipe": "mxfp8"}, {"tensor": 4}, r"ffn_hidden_size = 2736 of a rank is no multiple of 32"),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3}, {"tensor": 8}, None),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}, {"tensor": 8}, "ffn_hidden_size = 1368"),
        ({}, {"tensor": 4, "expert": 8, "expert_tensor": 64}, "= 24 of a rank .* lower parallel.expert_tensor"),
    ],
)
def test_matrices_that_transformer_engine_can_not_multiply_in_fp8_are_refused(
    more: dict[str, Any], layout: dict[str, int], refused: str | None, tmp_path: Path
) -> None:
    """Its assert_dim_for_fp8_exec comes minutes later and names no setting. GLM-4.5's first three layers are dense;
    GLM-4.5-Air's are 10944 wide."""
    released = json.loads((ROOT / "tests/models/released_configs.json").read_text())["GLM-4.5"]
    (tmp_path / "config.json").write_text(json.dumps({**released, "intermediate_size": 10944}))
    parallel = ParallelConfig(sequence_parallel=True, **layout)
    spec, fp8 = spec_of(tmp_path), {"fp8": "hybrid", **more}
    check_divisible(spec, parallel)
    if refused is None:
        check_divisible(spec, parallel, fp8)
        return
    with pytest.raises(ValueError, match=refused):
        check_divisible(spec, parallel, fp8)
