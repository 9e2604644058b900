"""What decides a training is compared on resume, named when it differs, and kept when it is taken deliberately."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_t1.algo.config import LossConfig
from megatron_t1.engine.config import ModelConfig
from megatron_t1.engine.resume_check import changes, check_changes, data_identity, model_identity, named
from megatron_t1.rollout.config import SamplingConfig
from tests.tiny import make_tiny_qwen2


def settings(tmp_path: Path, **other) -> dict:
    values = {"seed": 0, "size": 4, "rows": [("a", b"1")], "loss": LossConfig(), "sampling": SamplingConfig()} | other
    folder = tmp_path / str(other.get("model", 0))
    if not folder.exists():
        make_tiny_qwen2(folder, seed=other.get("model", 0))
    return named(
        **{"data": data_identity(values["rows"]), "seed": values["seed"], "sft.batch_size": values["size"]},
        loss=values["loss"],
        sampling=values["sampling"],
        model=model_identity(ModelConfig(hf_path=str(folder))),
    )


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"seed": 99}, "seed"),
        ({"size": 2}, "sft.batch_size"),
        ({"rows": [("a", b"2")]}, "data"),
        ({"rows": [("a", b"1"), ("b", b"1")]}, "data"),
        ({"model": 1}, "model"),
        ({"loss": replace(LossConfig(), kl_coef=0.5)}, "loss.kl_coef"),
        ({"sampling": SamplingConfig(temperature=1.1)}, "sampling.temperature"),
    ],
)
def test_other_settings_are_refused_by_name_or_kept_as_a_change(tmp_path: Path, other: dict, name: str) -> None:
    before = json.loads(json.dumps(settings(tmp_path)))
    now = settings(tmp_path, **other)
    changed = changes(before, now)
    assert changed == {name: [before[name], now[name]]}
    checkpoint = tmp_path / "sft" / "checkpoints" / "step_00000003"
    with pytest.raises(ValueError, match=rf"{name} = .* \(was .*--resume_with_changes"):
        check_changes(checkpoint, 3, changed, allowed=False)
    assert not (tmp_path / "sft").exists()
    check_changes(checkpoint, 3, changed, allowed=True)
    kept = (tmp_path / "sft" / "changes.jsonl").read_text()
    assert json.loads(kept) == {"step": 3, "changed": changed}


def test_the_same_settings_and_those_of_another_release_are_no_change(tmp_path: Path) -> None:
    now = settings(tmp_path)
    assert not changes(json.loads(json.dumps(now)), now)
    assert not changes({}, now)
    check_changes(tmp_path / "none", 0, {}, allowed=False)
