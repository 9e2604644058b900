"""`parallel.offload`: the memory is really given, and no number of a run depends on it."""

from __future__ import annotations

import json
import weakref

import pytest
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_t1.engine import model  # noqa: F401
from megatron_t1.platform.detect import setup
from tests.forks import WORKERS
from tests.tiny import make_tiny

CASES = {
    "plain optimizer": ("Qwen2ForCausalLM", "float32", 1, {"offload": "optimizer", "distributed_optimizer": False}),
    "DP2, all": ("Qwen2ForCausalLM", "bfloat16", 2, {"offload": "all"}),
    "virtual pipeline, tied": (
        "Qwen2ForCausalLM", "bfloat16", 2, {"offload": "optimizer", "pipeline": 2, "virtual_pipeline": 2},
    ),
    "experts": ("Qwen3MoeForCausalLM", "bfloat16", 2, {"offload": "all", "expert": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bit_equal_with_its_memory_given(case, run_ranks, tmp_path):
    family, dtype, num_ranks, layout = CASES[case]
    depth = {"num_hidden_layers": 4} if "virtual_pipeline" in layout else {}
    model_dir = make_tiny(family, tmp_path / "hf", vocab_size=321, tied="tied" in case, dtype=dtype, **depth)
    output = run_ranks(WORKERS / "offload_worker.py", num_ranks, model_dir, tmp_path / "run", dtype, json.dumps(layout))
    for found in json.loads(output.splitlines()[-1]):
        assert found["metrics"]
        assert found["differ"] == [[], []]
        assert found["asked"] is (True if layout["offload"] == "optimizer" else None)
        # Bytes a parameter: gradients, moments and float32 weights (of two ranks, or one), anchor, weights with `all`.
        shards = 2 if case == "DP2, all" else 1
        per_parameter = 4 + 8 + 4 if dtype == "float32" else 4 + 12 / shards + 6 + 2 * (layout["offload"] == "all")
        fp8 = 1  # the copy
        if family != "Qwen3MoeForCausalLM":  # its experts are not replicated, the rest is
            assert found["freed"] == pytest.approx((per_parameter + fp8) * found["parameters"], rel=0.02)
        else:
            assert found["freed"] > (16 + fp8) * found["parameters"]


def test_angles_of_earlier_lengths_hold_no_memory():
    setup()
    rotary = RotaryEmbedding(kv_channels=32, rotary_percent=1.0, use_cpu_initialization=True)
    tables = [weakref.ref(rotary(length)) for length in (77, 78, 79)]
    assert [table() for table in tables] == [None] * 3
