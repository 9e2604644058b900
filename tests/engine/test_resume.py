"""A resumed run is the uninterrupted one: bit for bit on the same layout, within rounding on another."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from megatron_t1.convert import to_hf
from megatron_t1.engine import checkpoint, saving
from megatron_t1.engine.checkpoint import finished, step_of
from megatron_t1.engine.config import CheckpointConfig, ParallelConfig
from tests.forks import WORKERS
from tests.tiny import make_tiny, make_tiny_qwen2

WORKER = WORKERS / "resume_worker.py"


@pytest.fixture(scope="module")
def train(run_ranks, model_dir):
    def run(run_dir, layout, ranks, total, resume="fresh", every=3):
        output = run_ranks(WORKER, ranks, run_dir, model_dir, json.dumps(layout), total, every, resume)
        (run_dir / "output").write_text(output)
        metrics = [json.loads(line) for line in (run_dir / "sft/metrics.jsonl").read_text().splitlines()]
        return metrics, load_file(run_dir / "sft/hf/model.safetensors")

    return run


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("model") / "hf", vocab_size=321, init_std=0.1)


@pytest.fixture(scope="module", params=[({}, 2), ({"tensor": 2}, 2)], ids=["DP2", "TP2"])
def straight(request, train, tmp_path_factory):
    """Six steps, with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("straight")
    layout, ranks = request.param
    return folder, layout, ranks, *train(folder, layout, ranks, 6)


def cut_after_three(folder, tmp_path):
    shutil.copytree(folder / "sft/checkpoints/step_00000003", tmp_path / "sft/checkpoints/step_00000003")
    shutil.copy(folder / "sft/metrics.jsonl", tmp_path / "sft")


def test_stopped_between_two_microbatches_it_goes_on_bit_equal(straight, train, run_ranks, model_dir, tmp_path):
    _, layout, ranks, metrics, weights = straight
    run_ranks(WORKER, ranks, tmp_path, model_dir, json.dumps(layout), 6, 99, "stopped")
    assert [path.name for path in finished(tmp_path / "sft/checkpoints")] == ["step_00000003"]
    assert len((tmp_path / "sft/metrics.jsonl").read_text().splitlines()) == 3
    resumed_metrics, resumed = train(tmp_path, layout, ranks, 6, "resume")
    untimed = [
        [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds/train")} for row in run]
        for run in (metrics, resumed_metrics)
    ]
    assert untimed[1] == untimed[0]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [({}, 1), ({"pipeline": 2}, 2), ({"context": 2}, 2)],
    ids=["one process", "PP2", "CP2"],
)
def test_another_layout_goes_on_with_the_same_numbers(layout, ranks, straight, train, tmp_path):
    folder, _, _, metrics, weights = straight
    cut_after_three(folder, tmp_path)
    resumed_metrics, resumed = train(tmp_path, layout, ranks, 6, "resume")
    assert [row["step"] for row in resumed_metrics] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(resumed_metrics[3:], metrics[3:], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in weights.items():
        assert (resumed[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("layout", "num_ranks", "bucket_size", "decay"),
    [
        ({}, 1, 0, 0.9),
        ({}, 1, 0, 1),
        ({"pipeline": 2}, 2, 0, 0.9),  # the shared embedding's gradient is a bucket of its own
        ({"overlap_grad_reduce": True}, 3, 50_000, 0.9),
    ],
    ids=["one process", "fixed anchor", "PP2 tied", "DP3 with several buckets"],
)
def test_what_is_loaded_is_what_was_saved(dtype, layout, num_ranks, bucket_size, decay, run_ranks, tmp_path):
    # Megatron pads buckets to multiples of 128 numbers (of 384 for DP3); none of these matrices is one.
    model_dir = make_tiny_qwen2(tmp_path / "hf", vocab_size=321, hidden_size=96, num_heads=3, num_kv_heads=1)
    worker = WORKERS / "checkpoint_worker.py"
    output = run_ranks(worker, num_ranks, model_dir, tmp_path / "run", dtype, json.dumps(layout), bucket_size, decay)
    differences = json.loads(output.splitlines()[-1])
    assert (differences.pop("num_buckets") > 1) == (num_ranks > 1)
    assert {name: value for name, value in differences.items() if value > 1e-6} == {}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_stage_without_experts_saves_and_loads(distributed_optimizer, run_ranks, tmp_path):
    model_dir = make_tiny("Glm4MoeForCausalLM", tmp_path / "hf", vocab_size=321)  # its first layer has none
    layout = {"pipeline": 2, "expert": 2, "distributed_optimizer": distributed_optimizer}
    worker = WORKERS / "checkpoint_worker.py"
    output = run_ranks(worker, 4, model_dir, tmp_path / "run", "float32", json.dumps(layout), 0, 0.9)
    differences = json.loads(output.splitlines()[-1])
    assert {name: value for name, value in differences.items() if value > 1e-6} == {"num_buckets": 1}


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Missing key in checkpoint state_dict: decoder.final_layernorm._extra_state/shard_0_1.",
         r"was written with model.layers = local .* Resume with --model.layers local"),
        ("optimizer.state.param.decoder.final_layernorm.weight from model not in state dict: "
         "['decoder.final_layernorm._extra_state/shard_0_1', 'decoder.final_layernorm.weight']",
         r"can't be loaded \(rank 0: optimizer.state.param.decoder.final_layernorm.weight from model"),
        ("No space left on device", r"can't be loaded \(rank 0: No space left on device\)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_load_says_why(reason, said, monkeypatch, tmp_path):
    (tmp_path / "state.json").write_text('{"step": 1}')

    def fails(*_):
        raise CheckpointException("load", {0: _wrap_exception(RuntimeError(reason))})

    monkeypatch.setattr(checkpoint, "_prime", lambda engine: None)
    monkeypatch.setattr(checkpoint, "sharded_state", lambda *_, **options: {})
    monkeypatch.setattr(checkpoint.dist_checkpointing, "load", fails)
    with pytest.raises(ValueError, match=said):
        checkpoint.load(tmp_path, SimpleNamespace(parallel=ParallelConfig()), None)


def test_an_anchor_that_was_never_kept_is_not_made_up(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 1, "anchor": false}')
    with pytest.raises(ValueError, match=r"kl_coef = 0 and holds no anchor\. Resume with --loss.kl_coef 0, or export"):
        checkpoint.load(tmp_path, SimpleNamespace(parallel=ParallelConfig()), object())


def test_an_optimizer_that_counts_its_steps_elsewhere_is_left_alone():
    """As Transformer Engine's and Apex's, which GPUs have: their state by parameter holds no step."""
    weight = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    for _ in range(2):
        checkpoint._count_steps_without_parameters(
            SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]))
        )
        inner.step()
    assert [set(state) for state in inner.state.values()] == [{"momentum_buffer"}]


def test_an_optimizer_of_another_kind_is_not_loaded(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 1, "distributed_optimizer": true}')
    engine = SimpleNamespace(parallel=ParallelConfig(distributed_optimizer=False))
    with pytest.raises(ValueError, match=r"distributed_optimizer = True and is loaded with False.* Resume with "
                                         r"--parallel.distributed_optimizer true"):  # fmt: skip
        checkpoint.load(tmp_path, engine, None)


def test_an_unfinished_checkpoint_is_never_picked_up(straight, train, tmp_path):
    folder, layout, ranks, metrics, _ = straight
    cut_after_three(folder, tmp_path)
    shutil.copytree(tmp_path / "sft/checkpoints/step_00000003", tmp_path / "sft/checkpoints/step_00000005.tmp")
    resumed_metrics, _ = train(tmp_path, layout, ranks, 6, "resume")
    assert resumed_metrics[3]["loss"] == metrics[3]["loss"]
    assert not list((tmp_path / "sft/checkpoints").glob("*.tmp"))


def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(straight, train, model_dir, forks, tmp_path):
    """kill -9 with a checkpoint half written: a second preemption, or a node that fails, in a save."""
    *_, metrics, weights = straight
    (process,) = forks.start(WORKER, tmp_path, model_dir, "{}", 6, 1, "fresh")
    checkpoints, caught = tmp_path / "sft/checkpoints", None
    while caught is None:
        assert process.poll() is None, "it was over before a save was caught"
        for building in checkpoints.glob("step_*.tmp"):
            process.send_signal(signal.SIGSTOP)  # so that it stays as it is while we look again
            if building.exists() and len(finished(checkpoints)) > 1:
                caught = building
            else:
                process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert caught.exists()
    kept = int(finished(checkpoints)[-1].name.removeprefix("step_"))
    rows = (tmp_path / "sft/metrics.jsonl").read_text().splitlines()
    assert len(rows) == kept + 1
    resumed_metrics, resumed = train(tmp_path, {}, 1, 6, "resume")
    assert [row["step"] for row in resumed_metrics] == [1, 2, 3, 4, 5, 6]
    assert resumed_metrics[:kept] == [json.loads(row) for row in rows[:kept]], "it did not go on, it began again"
    for row, expected in zip(resumed_metrics, metrics, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in weights.items():
        assert (resumed[name] - value).norm() <= 1e-5 * value.norm(), name
    assert not list(checkpoints.glob("*.tmp"))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_damaged_checkpoint_is_passed_over_with_a_word(straight, train, tmp_path):
    folder, layout, ranks, metrics, weights = straight
    cut_after_three(folder, tmp_path)
    newest = tmp_path / "sft/checkpoints/step_00000006"
    shutil.copytree(folder / "sft/checkpoints/step_00000006", newest)
    flip_a_bit(max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size))
    resumed_metrics, resumed = train(tmp_path, layout, ranks, 6, "resume")
    output = (tmp_path / "output").read_text()
    assert "step_00000006 is damaged" in output
    assert "has other contents than were written; looking at the one before" in output
    assert [row["loss"] for row in resumed_metrics] == [row["loss"] for row in metrics]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize("distributed", [False, True])
def test_another_learning_rate_is_that_of_the_steps_from_then_on(distributed, train, tmp_path):
    """Megatron's parameter groups bring back the one of the checkpoint."""
    layout = {"distributed_optimizer": distributed}
    before, _ = train(tmp_path, layout, 2, 3)
    after, _ = train(tmp_path, layout, 2, 6, "slower")
    assert max(row["lr"] for row in before) == pytest.approx(1e-3)
    assert all(0 < row["lr"] <= 1e-5 for row in after[3:]), [row["lr"] for row in after]


def test_every_kind_of_damage_is_seen(straight, run_ranks, tmp_path):
    whole = straight[0] / "sft/checkpoints/step_00000006"
    kinds = {
        "whole": lambda folder: None,
        "cut": lambda folder: cut_short(next(folder.glob("*.distcp"))),
        "flipped": lambda folder: flip_a_bit(folder / "common.pt"),
        "gone": lambda folder: (folder / ".metadata").unlink(),
        "stateless": lambda folder: (folder / "state.json").write_text('{"step": '),
    }
    for name, spoil in kinds.items():
        shutil.copytree(whole, tmp_path / name)
        spoil(tmp_path / name)
    output = run_ranks(WORKERS / "damage_worker.py", 2, *(tmp_path / name for name in kinds))
    found = json.loads(output.splitlines()[-1])
    assert found[0] is None
    assert re.fullmatch(r"\S+\.distcp has \d+ bytes, \d+ were written", found[1])
    assert found[2] == "common.pt has other contents than were written"
    assert found[3] == ".metadata can't be read (No such file or directory)"
    assert found[4] == "it has no readable state.json"


def test_the_newest_and_the_best_stay(tmp_path):
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], start=1):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step, "score": score}))
        saving._rotate(tmp_path, folder, CheckpointConfig(keep=2, keep_best=1))
    assert [int(path.name[5:]) for path in finished(tmp_path)] == [2, 4, 5]
    # After a resume from step 2 (4 and 5 were damaged) the next one is of step 3; the later ones count for nothing.
    assert [step_of(path) for path in finished(tmp_path, until=3)] == [2]
    saving._rotate(tmp_path, tmp_path / "step_00000003", CheckpointConfig(keep=1, keep_best=0))
    assert [int(path.name[5:]) for path in finished(tmp_path)] == [2, 4, 5]
    saving._rotate(tmp_path, folder, CheckpointConfig(keep=1, keep_best=0))
    assert [int(path.name[5:]) for path in finished(tmp_path)] == [5]
    while len(list(tmp_path.iterdir())) > 1:  # removed in the background
        time.sleep(0.01)


def test_a_checkpoint_converts_to_what_the_run_exported_and_starts_another_run(
    straight, run_ranks, model_dir, tmp_path
):
    folder, layout, ranks, _, weights = straight
    newest = folder / "sft/checkpoints/step_00000006"
    to_hf(newest, tmp_path / "hf")
    converted = load_file(tmp_path / "hf/model.safetensors")
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], value) for name, value in weights.items())
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    run_ranks(WORKER, ranks, tmp_path / "from megatron", newest, json.dumps(layout), 1, 1, "fresh")
    run_ranks(WORKER, ranks, tmp_path / "from hf", tmp_path / "hf", json.dumps(layout), 1, 1, "fresh")
    one, other = (load_file(tmp_path / name / "sft/hf/model.safetensors") for name in ("from megatron", "from hf"))
    assert all(torch.equal(one[name], value) for name, value in other.items())
