"""A finished fine-tuning is that of the settings with which `t1 run` goes on, or it is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_t1 import learner, sft
from megatron_t1.config import Config
from megatron_t1.engine.config import ModelConfig, OptimConfig
from megatron_t1.engine.resume_check import changes
from megatron_t1.engine.writers import digest
from megatron_t1.files import read_jsonl
from megatron_t1.platform.detect import setup
from megatron_t1.types import TrainSequence
from tests.engine.batch import make_sequences
from tests.forks import WORKERS
from tests.push import reference
from tests.workers.heldout_worker import BATCHES


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sequence(*ids: int) -> TrainSequence:
    return TrainSequence(prompt_ids=np.array([1]), response_ids=np.array(ids))


def test_a_finished_one_is_compared_with_what_is_asked_for(alone: None, tiny_dir: Path, tmp_path: Path) -> None:
    examples = [sequence(2, 3), sequence(4)]
    cfg = Config(run_dir=str(tmp_path), model=ModelConfig(hf_path=str(tiny_dir)), resume=True)
    sft.check_finished(cfg, examples)  # its checkpoints were removed
    newest = tmp_path / "sft/checkpoints/step_00000004"
    newest.mkdir(parents=True)
    state = {"step": 4, "settings": sft._settings(cfg, examples)}
    (newest / "state.json").write_text(json.dumps(state))
    sft.check_finished(cfg, examples)
    with pytest.raises(
        ValueError, match=r"step_00000004 was made with other settings: data.sft = '1 lines.*was '2 lines"
    ):
        sft.check_finished(cfg, examples[:1])
    other = replace(cfg, sft=replace(cfg.sft, batch_size=cfg.sft.batch_size + 1))
    with pytest.raises(ValueError, match=r"sft\.batch_size = "):
        sft.check_finished(other, examples)
    sft.check_finished(replace(other, resume_with_changes=True), examples)
    kept = json.loads((tmp_path / "sft/changes.jsonl").read_text())
    assert list(kept["changed"]) == ["sft.batch_size"]


def test_a_run_that_may_not_go_on_is_refused_before_its_model_is_built(
    alone: None, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("minutes, for a large one")

    monkeypatch.setattr(sft, "Engine", built)
    examples = [sequence(2, 3), sequence(4)]
    cfg = Config(run_dir=str(tmp_path), model=ModelConfig(hf_path=str(tiny_dir)))
    cfg = replace(cfg, sft=replace(cfg.sft, batch_size=1))
    newest = tmp_path / "sft/checkpoints/step_00000004"
    newest.mkdir(parents=True)
    (newest / "common.pt").write_bytes(b"numbers")
    files = {"common.pt": digest(newest / "common.pt")}
    state = {"step": 4, "settings": sft._settings(cfg, examples), "files": files}
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step_00000004 is there already: give --resume"):
        sft.train(cfg, setup(), examples)
    resumed = replace(cfg, resume=True)
    with pytest.raises(ValueError, match=r"was made with other settings: seed = 1 \(was 0\)"):
        sft.train(replace(resumed, seed=1), setup(), examples)
    with pytest.raises(AssertionError, match="minutes"):
        sft.train(resumed, setup(), examples)


@pytest.mark.parametrize(("schedule", "decides"), [("constant", False), ("linear", True), ("cosine", True)])
def test_the_number_of_steps_decides_a_run_whose_learning_rate_rests_on_it(
    schedule: Any, decides: bool, tiny_dir: Path
) -> None:
    """Resumed with twice as many steps, a cosine that was at its end would be in its middle."""
    optim, model = OptimConfig(lr=1e-3, schedule=schedule), ModelConfig(hf_path=str(tiny_dir))
    cfg = Config(model=model)
    cfg = replace(cfg, sft=replace(cfg.sft, batch_size=1, optim=optim), rl=replace(cfg.rl, optim=optim))
    examples = [sequence(2, 3), sequence(4)]
    of_sft, of_rl = sft._settings(cfg, examples), learner._settings(cfg, [])
    longer = replace(cfg, sft=replace(cfg.sft, epochs=5), rl=replace(cfg.rl, steps=501))
    more = changes(of_sft, sft._settings(longer, examples)), changes(of_rl, learner._settings(longer, []))
    name = "steps of sft.optim.schedule (by sft.epochs, sft.max_steps)"
    assert more == (({name: [6, 10]}, {"rl.steps": [500, 501]}) if decides else ({}, {}))
    cut_alike = replace(cfg, sft=replace(cfg.sft, max_steps=6, epochs=9))
    assert not changes(of_sft, sft._settings(cut_alike, examples))
    of_older_release = {key: value for key, value in of_sft.items() if key != name}
    assert not changes(of_older_release, sft._settings(longer, examples))


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"tensor": 2}, {}], ids=["PP2", "TP2", "DP2"])
def test_examples_that_are_held_out_are_measured_and_not_trained_on(
    layout: dict[str, Any], run_ranks: Any, tiny_dir: Path, tmp_path: Path
) -> None:
    run_ranks(WORKERS / "heldout_worker.py", 2, tmp_path, tiny_dir, json.dumps(layout))
    rows = read_jsonl(tmp_path / "sft/metrics.jsonl")
    assert [row["step"] for row in rows if "heldout_nll" in row] == [2, 3]

    everything = make_sequences(vocab_size=321)
    trained, heldout = sft._split(Config(sft=BATCHES), everything)
    number = {id(example): i for i, example in enumerate(everything)}
    assert sorted(number[id(example)] for example in trained + heldout) == list(range(9))
    assert {row["num_tokens"] for row in rows} == {sum(len(example.response_ids) for example in trained)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/hf", dtype=torch.float32).eval()
    logprobs = [
        reference.logprobs(model, example.prompt_ids.tolist(), example.response_ids.tolist(), 1.0)
        for example in heldout
    ]
    assert rows[-1]["heldout_nll"] == pytest.approx(-np.concatenate(logprobs).mean(), rel=1e-5)


def test_a_batch_must_be_left_to_train_on() -> None:
    cfg = Config(sft=replace(BATCHES, num_heldout=5))
    message = r"sft\.batch_size = 5 is larger than the 9 examples less sft\.num_heldout = 5"
    with pytest.raises(ValueError, match=message):
        sft.train(cfg, setup(), make_sequences(vocab_size=321))
