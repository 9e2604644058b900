"""The allow-list of `model.transformer` holds what Megatron knows, and nothing that a model family sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_t1.engine.config import TRANSFORMER_FIELDS, ModelConfig, ParallelConfig
from megatron_t1.engine.layout import check_divisible
from megatron_t1.fields import FieldError
from megatron_t1.models import spec_of
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


def test_ways_between_context_ranks_that_can_not_be_gone_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(FieldError, match=r"transformer.cp_comm_type = 'a2a\+p2p' must be p2p"):
        ModelConfig(transformer={"cp_comm_type": "a2a+p2p"})
    model = ModelConfig(hf_path=str(tiny_dir), transformer={"cp_comm_type": "a2a"})
    with pytest.raises(ValueError, match=r"the 2 KV heads of a rank do not divide by parallel.context = 4, give p2p"):
        check_divisible(spec_of(tiny_dir), ParallelConfig(context=4), model.transformer)
