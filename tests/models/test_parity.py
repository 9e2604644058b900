"""Every family on every layout computes what transformers computes, and leaves as the bytes that came."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_t1.weights.hf_folder import HFFolder
from tests.models.layouts import LAYOUTS, RESUMED
from tests.workers.parity_worker import ADAM_EPS


def cases(wanted):
    found = [
        (num_ranks, layout, family)
        for num_ranks, layouts in LAYOUTS.items()
        for layout, (fields, families) in layouts.items()
        if wanted(fields)
        for family in sorted(families)
    ]
    return pytest.mark.parametrize(
        ("num_ranks", "layout", "family"), found, ids=[f"{family} {layout}" for _, layout, family in found]
    )


@pytest.mark.timeout(4000)
@cases(lambda fields: "distributed_optimizer" not in fields)
def test_logits_gradients_and_bytes(num_ranks, layout, family, results, expected, checkpoints):
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

    assert bytes_of(out) == bytes_of(checkpoints / family)


@pytest.mark.timeout(4000)
@cases(lambda fields: fields.get("distributed_optimizer") and "checkpoint_of" not in fields)
def test_a_step_of_the_distributed_optimizer(num_ranks, layout, family, results, expected, checkpoints):
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (checkpoints / family, results(num_ranks) / layout / family)
    )
    for name, gradient in expected(family)[1].items():
        step = 1e-3 * gradient / (gradient.abs() + ADAM_EPS)  # Adam's first one
        error = (before[name].double() - after[name].double() - step).norm() / step.norm()
        assert error <= 1e-3, f"{name}: relative error {error:.2e}"


@pytest.mark.timeout(4000)
@cases(lambda fields: "checkpoint_of" in fields)
def test_a_checkpoint_of_experts_loads(num_ranks, layout, family, results):
    out = results(num_ranks)
    assert bytes_of(out / layout / family) == bytes_of(out / RESUMED / family)


def bytes_of(folder):
    """Tensor name -> dtype, shape and bytes."""
    found = HFFolder(folder)
    return {
        name: (info, found.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        for name, info in found.tensors.items()
    }
