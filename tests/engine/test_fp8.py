"""FP8 takes its scales from the tensors themselves: nothing that a checkpoint would have to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_t1.engine.config import ModelConfig, ParallelConfig
from megatron_t1.engine.model import build_model, transformer_config
from megatron_t1.fields import FieldError
from megatron_t1.models import spec_of
from megatron_t1.platform.detect import Platform

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
