"""Every family on every layout computes what transformers computes, and leaves as the bytes that came."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_t1.weights.hf_folder import HFFolder
from tests.models.layouts import LAYOUTS, RESUMED
from tests.workers.parity_worker import ADAM_EPS, CLIP_GRAD, LR


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
    for name, value in clipped(gradients).items():
        error = (found[f"grad/{name}"].double() - value).norm() / value.norm()
        assert error <= 1e-4, f"gradient of {name}: relative error {error:.2e}"

    assert bytes_of(out) == bytes_of(checkpoints / family)


@pytest.mark.timeout(4000)
@cases(lambda fields: "checkpoint_of" not in fields)
def test_a_clipped_step(num_ranks, layout, family, results, expected, checkpoints):
    """The gradient norm counts every parameter once, however it is cut and copied."""
    found = load_file(results(num_ranks) / layout / family / "results")
    gradients = expected(family)[1]
    assert found["norm"].item() == pytest.approx(norm_of(gradients), rel=1e-5)

    before = HFFolder(checkpoints / family)
    steps = {name: LR * g / (g.abs() + ADAM_EPS) for name, g in clipped(gradients).items()}  # Adam's first one
    for name, after in found.items():
        if not name.startswith("after/"):
            continue
        name = name.removeprefix("after/")
        weight, step = before.read(name).double(), steps.get(name)
        if step is None:  # a router's bias, which T1's loss does not train
            assert torch.equal(after.double(), weight), name
            continue
        assert (after.double() - (weight - step)).norm() <= 1e-5 * weight.norm(), name
        error = (weight - after.double() - step).norm() / step.norm()
        assert error <= 1e-3, f"step of {name}: relative error {error:.2e}"


@pytest.mark.timeout(4000)
@cases(lambda fields: "checkpoint_of" in fields)
def test_a_checkpoint_of_experts_loads(num_ranks, layout, family, results):
    out = results(num_ranks)
    saved = load_file(out / RESUMED / family / "results")
    resumed = HFFolder(out / layout / family)
    trained = {name.removeprefix("after/"): tensor for name, tensor in saved.items() if name.startswith("after/")}
    assert all(torch.equal(resumed.read(name), tensor) for name, tensor in trained.items())


def norm_of(gradients):
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def clipped(gradients):
    scale = CLIP_GRAD / (norm_of(gradients) + 1e-6)
    assert scale < 1
    return {name: gradient * scale for name, gradient in gradients.items()}


def bytes_of(folder):
    """Tensor name -> dtype, shape and bytes."""
    found = HFFolder(folder)
    return {
        name: (info, found.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        for name, info in found.tensors.items()
    }
