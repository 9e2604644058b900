"""Transformer Engine's layer spec of every family, built of a stand-in in plain torch, against the local layers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ROOT, WORKERS, Forks, environment
from tests.models.families import FAMILIES, MOE
from tests.models.layouts import DENSE, SP

ALIKE = {"qwen3 tied", "qwen3_moe dense layer", "glm4 bias", "glm4_moe extra layer", "chatglm"}
"""Families that differ from another one in what the kind of layers has no part in."""
FEW = set(FAMILIES) - ALIKE
SAVED = {"qwen2 tied", "glm4", "qwen3_moe", "glm4_moe"}
"""A checkpoint of each kind of layer."""
LAYOUTS: dict[tuple[int, bool], dict[str, tuple[dict[str, Any], set[str]]]] = {
    (1, False): {"TP1": ({}, {*FEW, "qwen2 yarn"})},
    (2, False): {
        "TP2 SP": ({"tensor": 2, **SP}, FEW),
        "CP2": ({"context": 2, "max_tokens_per_microbatch": 64}, {"qwen2 yarn", "qwen3", "glm", "glm4_moe"}),
    },
    (1, True): {"TP1": ({}, ALIKE)},
    (2, True): {
        "TP2 SP": ({"tensor": 2, **SP}, ALIKE),
        "TP2": ({"tensor": 2}, DENSE),
        "PP2": ({"pipeline": 2}, set(FAMILIES)),
        "EP2": ({"expert": 2}, MOE),
        "CP2": ({"context": 2, "max_tokens_per_microbatch": 64}, set(FAMILIES) - {"qwen3", "glm", "glm4_moe"}),
        "CP2 EP2": ({"context": 2, "expert": 2, "max_tokens_per_microbatch": 64}, MOE),
        "TP2 SP, EP2 of whole experts": ({"tensor": 2, **SP, "expert": 2, "expert_tensor": 1}, MOE),
    },
}
"""(number of ranks, whether it is slow) -> layout -> ParallelConfig's fields and families."""


@pytest.fixture(scope="session")
def te_forks():
    """Trainer processes that found the stand-in when they imported Megatron."""
    env = environment()
    env["PYTHONPATH"] = f"{ROOT / 'tests' / 'te_standin'}:{env['PYTHONPATH']}"
    started = Forks(("transformers.models.auto.modeling_auto", "megatron_t1.engine.checkpoint"), env)
    yield started, env
    started.close()


@pytest.fixture(scope="session")
def te_results(checkpoints: Path, te_forks: tuple[Forks, dict[str, str]], tmp_path_factory: pytest.TempPathFactory):
    """Key of LAYOUTS -> folder of results: all its layouts share the start of the processes."""
    forks, env = te_forks

    @functools.cache
    def run(num_ranks: int, slow: bool) -> Path:
        out = tmp_path_factory.mktemp("te")
        layouts = {
            layout: (fields, {family: family in SAVED for family in sorted(families)})
            for layout, (fields, families) in LAYOUTS[num_ranks, slow].items()
        }
        arguments = (WORKERS / "te_worker.py", checkpoints, out, json.dumps(layouts))
        done = forks.run(*arguments, num_ranks=num_ranks, timeout_s=1500, env=env)
        assert done.returncode == 0, done.stderr[-6000:]
        return out

    return run


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("num_ranks", "slow", "layout", "family"),
    [
        pytest.param(
            num_ranks, slow, layout, family, marks=[pytest.mark.slow] * slow, id=f"{family} {layout}"
        )
        for (num_ranks, slow), layouts in LAYOUTS.items()
        for layout, (_, families) in layouts.items()
        for family in sorted(families)
    ],
)  # fmt: skip
def test_te_layers_compute_what_local_layers_do(num_ranks, slow, layout, family, te_results) -> None:
    found = json.loads((te_results(num_ranks, slow) / layout / family / "results.json").read_text())
    assert found["built of"] == [False, True]
    for name in ("loss", "grad_norm"):
        local, te = found[name]
        assert te == pytest.approx(local, rel=1e-5), name
    assert found["moved"] > 1e-2, "the step changed nothing: what comes after it would show nothing"
    assert found["logprobs before"] < 2e-5
    assert found["logprobs after"] < 1e-4
    assert found["loaded into local layers"] < 1e-4
