"""Every family on every layout computes what transformers computes, and leaves as the bytes that came."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_t1.weights.hf_folder import HFFolder
from tests.launch import run_ranks
from tests.models.families import FAMILIES, MOE, reference

WORKER = Path(__file__).with_name("parity_worker.py")
DENSE = set(FAMILIES) - MOE

# number of ranks -> layout -> its fields and the families that are run on it
LAYOUTS = {
    1: {"TP1": ({}, FAMILIES)},
    2: {
        "TP2": ({"tensor": 2}, DENSE),
        "TP2 SP": ({"tensor": 2, "sequence_parallel": True}, FAMILIES),
        "PP2": ({"pipeline": 2, "pipeline_layers": [3, 1]}, FAMILIES),
        "PP2 VP2": ({"pipeline": 2, "virtual_pipeline": 2}, FAMILIES),
        "EP2": ({"expert": 2}, MOE),
        "TP2 SP, EP2 of whole experts": (
            {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1},
            MOE,
        ),
    },
    4: {
        "TP4, a KV head on two ranks": ({"tensor": 4}, DENSE),
        "TP2 SP EP2 of cut experts": ({"tensor": 2, "sequence_parallel": True, "expert": 2}, MOE),
        "PP2 EP2": ({"pipeline": 2, "expert": 2}, MOE),
        "TP2 PP2": ({"tensor": 2, "pipeline": 2}, DENSE),
        "TP2 PP2 SP": ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, FAMILIES),
    },
}
CASES = [
    (num_ranks, layout, family)
    for num_ranks, layouts in LAYOUTS.items()
    for layout, (_, families) in layouts.items()
    for family in sorted(families)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in FAMILIES.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """number of ranks -> folder of results; all layouts of one number of ranks share the start of the processes."""

    @functools.cache
    def run(num_ranks: int) -> Path:
        out = tmp_path_factory.mktemp("results")
        layouts = {name: (fields, sorted(families)) for name, (fields, families) in LAYOUTS[num_ranks].items()}
        try:
            run_ranks(WORKER, num_ranks, checkpoints, out, json.dumps(layouts), timeout_s=900)
        except AssertionError as error:
            print(error)  # what was written before is compared all the same
        return out

    return run


@pytest.fixture(scope="module")
def expected(checkpoints):
    return functools.cache(lambda family: reference(checkpoints / family))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("num_ranks", "layout", "family"), CASES, ids=[f"{f} {x}" for _, x, f in CASES])
def test_family(num_ranks, layout, family, results, expected, checkpoints):
    out = results(num_ranks) / layout / family
    found = load_file(out / "results")
    logits, gradients = expected(family)

    assert {name for name in found if name.startswith("logits/")} == {f"logits/{name}" for name in logits}
    scale = max(value.abs().max() for value in logits.values())
    worst = max((found[f"logits/{name}"] - value).abs().max() for name, value in logits.items())
    assert worst <= 1e-4 * scale, f"logits differ by {worst:.2e}, the largest is {scale:.2e}"

    assert {name for name in found if name.startswith("grad/")} == {f"grad/{name}" for name in gradients}
    for name, value in gradients.items():
        error = (found[f"grad/{name}"].double() - value).norm() / value.norm()
        assert error <= 1e-4, f"gradient of {name}: relative error {error:.2e}"

    before, after = bytes_of(checkpoints / family), bytes_of(out)
    assert after == before


def bytes_of(folder):
    """Tensor name -> dtype, shape and bytes."""
    found = HFFolder(folder)
    return {
        name: (info, found.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        for name, info in found.tensors.items()
    }
