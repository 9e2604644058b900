"""The layouts on which families are run: number of ranks -> name -> ParallelConfig's fields and the families."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tests.models.families import FAMILIES, MOE, YARN

DENSE = set(FAMILIES) - MOE
SP = {"sequence_parallel": True}
NORMS_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}

LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], Collection[str]]]] = {
    1: {
        "TP1": ({}, FAMILIES | YARN),
        "norms again in the backward pass": ({"model": {"transformer": NORMS_AGAIN}}, {"qwen2", "qwen3_moe", "glm4"}),
    },
    2: {
        "TP2": ({"tensor": 2}, DENSE),  # mixtures of experts need SP there
        "TP2 SP": ({"tensor": 2, **SP}, FAMILIES),
        "PP2": ({"pipeline": 2, "pipeline_layers": [3, 1]}, FAMILIES),
        "PP2 VP2": ({"pipeline": 2, "virtual_pipeline": 2}, {"qwen2", "qwen2 tied", "glm4", *MOE}),
        "EP2": ({"expert": 2}, MOE),
        "CP2": ({"context": 2, "max_tokens_per_microbatch": 64}, {"qwen2 tied", "qwen2 yarn", "qwen3", "glm", "glm4"}),
        "CP2 EP2": ({"context": 2, "expert": 2, "max_tokens_per_microbatch": 64}, {"qwen3_moe", "glm4_moe"}),
        "TP2 SP, EP2 of whole experts": ({"tensor": 2, **SP, "expert": 2, "expert_tensor": 1}, MOE),
        "EP2 distributed optimizer": ({"expert": 2, "distributed_optimizer": True}, {"qwen3_moe", "glm4_moe"}),
        "TP2 SP distributed optimizer": ({"tensor": 2, **SP, "distributed_optimizer": True}, {"glm4_moe"}),
        "PP2 distributed optimizer": ({"pipeline": 2, "distributed_optimizer": True}, {"glm4_moe", "qwen2 tied"}),
        "TP2 SP, EP2 of whole experts, distributed optimizer": (
            {"tensor": 2, **SP, "expert": 2, "expert_tensor": 1, "distributed_optimizer": True},
            {"glm4_moe"},
        ),
    },
    4: {
        "TP4, a KV head on two ranks": ({"tensor": 4}, {"qwen2", "qwen3", "glm4 bias", "chatglm"}),
        "TP2 SP EP2 of cut experts": ({"tensor": 2, **SP, "expert": 2}, MOE),
        "PP2 EP2": ({"pipeline": 2, "expert": 2}, MOE),
        "TP2 PP2": ({"tensor": 2, "pipeline": 2}, DENSE),
        "TP2 PP2 SP": ({"tensor": 2, "pipeline": 2, **SP}, FAMILIES),
        "CP2 TP2 SP, EP4 of whole experts": (
            {"context": 2, "tensor": 2, **SP, "expert": 4, "expert_tensor": 1, "max_tokens_per_microbatch": 64},
            {"glm4_moe"},
        ),
    },
}
RESUMED = "EP2 distributed optimizer"
LAYOUTS[2]["resumed"] = (
    {"expert": 2, "distributed_optimizer": True, "checkpoint_of": RESUMED},
    LAYOUTS[2][RESUMED][1],
)
