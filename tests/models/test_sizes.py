"""What a token costs, held to the products that torch counts in transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes
from tests.models.families import FAMILIES, load_model


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "glm4"])
def test_flops_are_those_of_the_products(family, tmp_path):
    FAMILIES[family](tmp_path)
    model, sizes = load_model(tmp_path, torch.float32), Sizes.of(spec_of(tmp_path))
    model.set_attn_implementation("eager")  # a product is counted, a fused kernel on the CPU is not

    def flops(num_tokens: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.arange(num_tokens)[None])
        return counter.get_total_flops()

    squares = (flops(128) - 2 * flops(64)) / (128**2 - 2 * 64**2)
    assert 2 * sizes.active == pytest.approx(flops(64) / 64 - 64 * squares, rel=0.01)  # but for a router
    # Eager attention computes what causality throws away, too.
    assert 2 * sizes.active * sizes.attention == pytest.approx(squares / 2)
