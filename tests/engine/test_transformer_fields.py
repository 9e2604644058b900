"""The allow-list of `model.transformer` holds what Megatron knows, and nothing that a model family sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_t1.data.packing import pack
from megatron_t1.engine.config import ATTENTION_BACKENDS, TRANSFORMER_FIELDS, ModelConfig, ParallelConfig
from megatron_t1.engine.layout import check_divisible
from megatron_t1.engine.model import transformer_config
from megatron_t1.fields import FieldError
from megatron_t1.models import spec_of
from megatron_t1.platform.detect import setup
from megatron_t1.types import TrainSequence
from tests.forks import ROOT

RELEASED = json.loads((ROOT / "tests/models/released_configs.json").read_text())


def test_megatron_knows_every_field() -> None:
    assert set(TRANSFORMER_FIELDS) <= set(TransformerConfig.__dataclass_fields__)


@pytest.mark.parametrize("release", RELEASED)
def test_no_field_is_one_that_the_checkpoint_decides(release: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[release]))
    assert not set(TRANSFORMER_FIELDS) & set(spec_of(tmp_path).transformer)


@pytest.mark.parametrize("name", ["context_parallel_size", "params_dtype", "fp8_param", "moe_z_loss_coeff", "hidden"])
def test_what_changes_the_computation_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match=name):
        ModelConfig(transformer={name: 1})


def test_the_attention_of_a_config_file_is_the_one_that_megatron_takes(tiny_dir: Path) -> None:
    """Megatron compares with members of its enumeration, and passes by any text."""
    for name in ATTENTION_BACKENDS:
        cfg = ModelConfig(hf_path=str(tiny_dir), transformer={"attention_backend": name})
        config = transformer_config(cfg, spec_of(tiny_dir), ParallelConfig(), setup())
        assert config.attention_backend is AttnBackend[name]
    assert set(ATTENTION_BACKENDS) == set(AttnBackend.__members__)
    with pytest.raises(FieldError, match=r"attention_backend = 'nonsense' must be one of flash, fused"):
        ModelConfig(transformer={"attention_backend": "nonsense"})


def test_a_recipe_without_fp8_is_refused() -> None:
    with pytest.raises(FieldError, match="fp8_recipe = 'blockwise' is not read without fp8"):
        ModelConfig(transformer={"fp8_recipe": "blockwise"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recompute_method": "uniform"}, "recompute_granularity: full"),
        ({"recompute_num_layers": 1}, "recompute_granularity: full"),
        ({"recompute_granularity": "selective", "recompute_method": "block"}, "recompute_granularity: full"),
        ({"recompute_granularity": "full", "recompute_modules": ["mlp"]}, "recompute_granularity: selective"),
        ({"cpu_offloading_num_layers": 2}, "cpu_offloading: True"),
        ({"offload_modules": ["core_attn"]}, "fine_grained_activation_offloading: True"),
        ({"fp8_dot_product_attention": True}, "fp8: e4m3 or hybrid"),
        ({"fp8": "hybrid", "num_layers_at_end_in_bf16": 2}, "first_last_layers_bf16: True"),
    ],
)
def test_a_field_that_megatron_would_pass_by_is_refused(fields: dict[str, Any], said: str) -> None:
    """The run would go on without: with all activations kept, say, until a long sample ends it."""
    with pytest.raises(FieldError, match=rf"transformer\.\w+ = .* is not read without {said}"):
        ModelConfig(transformer=fields)
    (name, value), *_ = reversed(fields.items())
    assert name in TRANSFORMER_FIELDS
    ModelConfig(transformer={**fields, name: None})
    # Megatron itself takes it and says nothing.
    TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=2, **{name: value})


@pytest.mark.parametrize("fp8", [None, "hybrid"])
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2])
def test_what_is_said_to_fit_is_what_is_packed(tensor: int, context: int, fp8: str | None) -> None:
    model = ModelConfig(transformer={"fp8": fp8} if fp8 else {})
    parallel = ParallelConfig(tensor=tensor, context=context, max_tokens_per_microbatch=100)

    def packs(num_tokens: int) -> bool:
        sequence = TrainSequence(
            prompt_ids=np.zeros(1, np.int64), response_ids=np.zeros(num_tokens - 1, np.int64), advantage=0.0,
            rollout_logprobs=np.zeros(num_tokens - 1, np.float32), group=0,
        )  # fmt: skip
        try:
            pack([sequence], max_tokens=100, context_size=context, multiple=parallel.multiple_of_rank(model))
        except ValueError:
            return False
        return True

    def fits(num_tokens: int) -> bool:
        try:
            parallel.check_fits(num_tokens, model)
        except ValueError:
            return False
        return True

    lengths = range(60 * context, 110 * context)
    assert [fits(n) for n in lengths] == [packs(n) for n in lengths]
    assert len({fits(n) for n in lengths}) == 2


def test_ways_between_context_ranks_that_can_not_be_gone_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(FieldError, match=r"transformer.cp_comm_type = 'a2a\+p2p' must be p2p"):
        ModelConfig(transformer={"cp_comm_type": "a2a+p2p"})
    model = ModelConfig(hf_path=str(tiny_dir), transformer={"cp_comm_type": "a2a"})
    with pytest.raises(ValueError, match=r"the 2 KV heads of a rank do not divide by parallel.context = 4, give p2p"):
        check_divisible(spec_of(tiny_dir), ParallelConfig(context=4), model.transformer)
