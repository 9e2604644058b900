"""The real loop through the real command: Megatron on gloo, a vLLM server process, the grader. Small, not mocked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, set_seed

from megatron_t1.config import Config, RLConfig
from megatron_t1.engine.config import ModelConfig
from megatron_t1.rl import max_logprob_diff
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.keys import KEY_FILE
from tests.extended import PACKAGE, PLUGINS, install
from tests.forks import ROOT, WORKERS

EXAMPLE = ROOT / "examples/quickstart/quickstart.yaml"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(t1, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    t1("quickstart-data", "--out", folder, "--num_sft_samples", 4000)
    # Two layers and two KV heads, so that TP2 and PP2 divide them.
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    config = Qwen2Config.from_pretrained(folder / "model", **sizes)
    set_seed(0)  # whether a model of this size learns enough to write chains is chance
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def tuned(t1, data, tmp_path_factory) -> Path:
    """The task's folder with a model that answers in the right form, sometimes correctly: rewards differ."""
    folder = tmp_path_factory.mktemp("tuned")
    t1("sft", *options(data, folder, **{"sft.max_steps": 1000}))
    shutil.copytree(data, folder / "task")
    shutil.rmtree(folder / "task/model")
    shutil.copytree(folder / "sft/hf", folder / "task/model")
    return folder / "task"


def options(data: Path, run_dir: Path, **overrides: object) -> list[str]:
    fixed = {
        "config": EXAMPLE,
        "run_dir": run_dir,
        "model.hf_path": data / "model",
        "data.sft": data / "sft.jsonl",
        "data.train": data / "rl.jsonl",
        "data.heldout": data / "heldout.jsonl",
        "rollout.num_servers": 1,
        "parallel.nproc_per_node": 1,
        "sft.max_steps": 20,
        "sft.optim.warmup_steps": 2,
        "sft.checkpoint.every_steps": 10,
        "rl.prompts_per_step": 4,
        "sampling.num_samples": 4,
        "sampling.max_new_tokens": 48,
        "rl.checkpoint.every_steps": 2,
    }
    return [part for name, value in {**fixed, **overrides}.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def server(start_t1, tuned, tmp_path_factory):
    """One `t1 serve` for all layouts, given to them by URL."""
    run_dir = tmp_path_factory.mktemp("serve")
    process = start_t1("serve", *options(tuned, run_dir), stdout=subprocess.PIPE)
    said = [process.stdout.readline() for _ in range(2)]
    assert said[0].startswith("rollout.urls:"), said
    url = json.loads(said[0].split(":", 1)[1].replace("'", '"'))
    key_file = Path(said[1].split(":", 1)[1].strip())
    assert key_file.stat().st_mode & 0o777 == 0o600
    yield {"rollout.urls": json.dumps(url), "rollout.key_file": key_file}
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_two_ranks_of_one_command_stop_in_order(number, data, start_t1, tmp_path):
    arguments = options(data, tmp_path, **{"parallel.nproc_per_node": 2, "sft.max_steps": 4000})
    process = start_t1("sft", *arguments, stderr=subprocess.PIPE)
    metrics = tmp_path / "sft/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(rows(metrics)) >= 3):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 75, said[-3000:]
    assert "stopped as asked" in said
    (*_, newest) = sorted((tmp_path / "sft/checkpoints").iterdir())
    assert newest.name == f"step_{len(rows(metrics)):08d}"


@pytest.mark.timeout(3000)
def test_the_whole_pipeline_on_two_ranks(data, start_t1, t1, tmp_path):
    """SFT, evaluation, RL, evaluation, scaling, report; then resumed, when nothing is left to do."""
    few = {"scaling.budgets": "[8,16]", "evaluate.sampling.num_samples": 1, "scaling.sampling.num_samples": 1}
    arguments = options(data, tmp_path, **few, **{"parallel.nproc_per_node": 2, "rl.steps": 2})
    process = start_t1("run", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=2000)
    assert process.returncode == 0, output[-6000:]
    assert "pass@1" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= summary["sft_pass_at_1"] <= 1
    assert [budget for budget, _ in summary["scaling"]] == [8, 16]
    assert summary["seconds"]["total"] > summary["seconds"]["sft"]
    metrics = rows(tmp_path / "rl/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["logprob_diff"] < 1e-3, "train/rollout mismatch"
        assert row["weight_version"] == row["step"]
        assert row["oldest_version"] == row["step"] - 1, "sampled from the weights of the step before"
    for row in rows(tmp_path / "rl/samples.jsonl"):
        assert row["reward"]["reason"]
        assert [span[0] for span in row["weight_versions"]] == [row["step"] - 1]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").rglob("events.*"))
    assert "API_KEY" not in (tmp_path / "logs").joinpath("server_0.log").read_text()

    again = t1("run", *arguments, "--resume", num_ranks=2)
    assert "pass@1" in again
    assert [row["step"] for row in rows(tmp_path / "rl/metrics.jsonl")] == [1, 2]
    refused = t1("run", *arguments, num_ranks=2, expect=1)
    assert "give --resume to go on" in refused


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ({"parallel.tensor": 2, "parallel.sequence_parallel": "true"}, 2),
        ({"parallel.pipeline": 2}, 2),
        ({"parallel.context": 2}, 2),
        ({}, 1),
    ],
    ids=["TP2 SP", "PP2", "CP2", "one process"],
)
def test_rl_is_the_same_on_every_layout(layout, count, t1, tuned, server, tmp_path, request):
    """Three steps on each layout, all from the same weights and seeds: the same rewards, losses and exported model."""
    t1("rl", *options(tuned, tmp_path, **server, **layout, **{"rl.steps": 3}), num_ranks=count)
    mine = rows(tmp_path / "rl/metrics.jsonl")
    weights = load_file(tmp_path / "rl/hf/model.safetensors")
    reference = request.config.stash.setdefault(_REFERENCE, (mine, weights))
    for row, expected in zip(mine, reference[0], strict=True):
        assert row["logprob_diff"] < 1e-3
        assert row["groups_all_equal"] < 1, "no group had an advantage: the test would show nothing"
        for name in ("reward", "response_tokens_mean", "loss", "entropy", "kl_k1", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name
    for name, value in reference[1].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=5e-4)


_REFERENCE = pytest.StashKey[tuple]()


def test_a_run_stops_in_its_evaluations_and_scaling(data, forks, server, tmp_path):
    """Rank 0 is asked, both ranks end; what was measured is kept, and the last process ends the run."""
    few = {"scaling.budgets": "[8,16]", "evaluate.sampling.num_samples": 1, "scaling.sampling.num_samples": 1}
    arguments = options(data, tmp_path, **server, **few, **{"parallel.nproc_per_node": 2, "rl.steps": 1})
    parts = {
        "evaluate/sft/heldout/responses": "evaluate/sft/heldout/summary.json",
        "evaluate/rl/heldout/responses": "evaluate/rl/heldout/summary.json",
        "scaling/rl/thinkings": "scaling/rl/points.json",
        "scaling/rl/forced": "scaling/rl/points.json",
        "nothing": "nothing",
    }
    for part, not_written in parts.items():
        more = ["--resume"] if (tmp_path / "sft").exists() else []
        done = forks.run(WORKERS / "stopped_run_worker.py", part, *arguments, *more, num_ranks=2)
        assert not (tmp_path / not_written).exists()
        assert done.returncode == (0 if part == "nothing" else 75), done.stderr[-3000:]
    assert "stopped as asked" not in done.stderr
    for name in ("sft", "rl"):
        responses = rows(tmp_path / f"evaluate/{name}/heldout/responses.jsonl")
        assert len(responses) == len(rows(data / "heldout.jsonl"))
    assert (tmp_path / "summary.json").exists()


def test_servers_that_compute_another_function_end_the_run_before_a_step(
    t1, forks, fork_servers, tuned, server, tmp_path
):
    """Found when they got their first weights, here all but the packed copy of one, or in a step, which is dropped."""
    asked = {"rl.steps": 1, "rl.checkpoint.every_steps": 1}
    forgetful = RolloutConfig(
        device="cpu",
        dtype="float32",
        max_model_len=256,
        load_weights=False,
        vllm_args={"worker-extension-cls": "tests.push.forgetful.Forgetful"},
    )
    with fork_servers(forgetful, tuned / "model", tmp_path / "serve") as servers:
        given = {"rollout.urls": json.dumps([servers.all[0].url]), "rollout.key_file": tmp_path / "serve" / KEY_FILE}
        output = t1("rl", *options(tuned, tmp_path, **given, **asked), num_ranks=2, expect=1)
    assert "on weights 0, before the first step: the mean |trainer - servers| of logprobs is" in output
    assert "above rl.max_logprob_diff = 0.01" in output
    assert "Traceback" not in output
    arguments = options(tuned, tmp_path, **server, **asked)
    done = forks.run(WORKERS / "mismatch_worker.py", *arguments, num_ranks=2, timeout_s=600)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "step 1, which is dropped: the mean |trainer - servers|" in done.stderr
    assert not list((tmp_path / "rl/checkpoints").glob("*"))
    assert not rows(tmp_path / "rl/metrics.jsonl")


def test_servers_that_are_too_short_for_one_prompt_end_the_run_before_a_step(t1, fork_servers, data, tmp_path):
    """They have another rollout.max_model_len than this run. vLLM would cut the responses to it, which is of step 2."""
    prompts = rows(data / "rl.jsonl")[:8]
    seed = Config().seed
    last = np.random.default_rng((seed, 0)).permutation(8)[-1]
    prompts[last]["prompt"] += " + 0" * 50
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    short = RolloutConfig(device="cpu", dtype="float32", max_model_len=128)
    with fork_servers(short, data / "model", tmp_path / "serve") as servers:
        given = {"rollout.urls": json.dumps([servers.all[0].url]), "rollout.key_file": tmp_path / "serve" / KEY_FILE}
        given |= {"data.train": tmp_path / "rl.jsonl", "rl.steps": 2, "seed": seed}
        output = t1("rl", *options(data, tmp_path, **given), expect=1)
    assert "exceed the servers' max_model_len = 128: raise rollout.max_model_len" in output
    assert not rows(tmp_path / "rl/metrics.jsonl")


def test_the_bound_is_of_the_precision_that_is_set():
    def bound(dtype="float32", servers="float32", asked=None, lag=0, of_step=False, **sampling):
        return max_logprob_diff(
            Config(
                model=ModelConfig(dtype=dtype),
                rollout=RolloutConfig(dtype=servers),
                sampling=SamplingConfig(**sampling),
                rl=RLConfig(max_logprob_diff=asked, lag=lag),
            ),
            of_step=of_step,
        )

    assert bound() == 0.01
    assert bound("bfloat16", "bfloat16") == bound(servers="auto") == 0.2
    assert bound(asked=0.5) == 0.5
    assert bound(asked=0) == float("inf")
    assert (bound(lag=1), bound(lag=1, of_step=True)) == (0.01, 1)
    for cut in ({"min_p": 0.05}, {"top_p": 0.99}, {"top_k": 20}):  # the check is asked without them
        assert (bound(**cut), bound(**cut, of_step=True)) == (0.01, float("inf"))
        assert bound(**cut, asked=0.3, of_step=True) == 0.3


MEASURED = {
    "rl.measure_every": 2,
    "rl.snapshot_every": 2,
    "rl.steps": 4,
    "rl.prompts_per_step": 2,
    "sampling.num_samples": 8,  # samples.jsonl has two prompts of a step
    "parallel.max_tokens_per_microbatch": 256,
    "evaluate.sampling.num_samples": 1,
    "evaluate.sampling.max_new_tokens": 48,
}


TURNS = {"rollout.share_gpus": "true", "rollout.sleep": "true", "parallel.offload": "all"}


@pytest.mark.parametrize(
    ("asked_after", "more"), [(1, {}), (2, TURNS)], ids=["between checkpoints", "at a checkpoint, by turns"]
)
def test_a_run_that_is_asked_to_stop_goes_on_bit_equal(
    asked_after, more, straight, start_t1, t1, tuned, server, tmp_path
):
    """4 steps at once against a run that USR1 stops, and a new process: the same numbers, optimizer and anchor too. By
    turns, the trainer's memory really goes, while vLLM's CPU build keeps its own and takes the calls."""
    arguments = options(tuned, tmp_path, **server, **MEASURED, **more)
    log = Path(server["rollout.key_file"]).parent / "logs/server_0.log"
    before = log.stat().st_size
    process = start_t1("rl", *arguments, stderr=subprocess.PIPE)
    metrics = tmp_path / "rl/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(rows(metrics)) >= asked_after):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=200)
    done = len(rows(metrics))
    if done < 4:  # else the run was over before the signal came
        assert process.returncode == 75, said[-3000:]
        assert "stopped as asked" in said
        checkpoints = sorted(path.name for path in (tmp_path / "rl/checkpoints").iterdir())
        assert f"step_{done:08d}" in checkpoints
    output = t1("rl", *arguments, "--resume")
    assert "4/4" in output
    if more:
        t1("rl", *arguments, "--resume")  # its steps are done: it exports and measures again
    assert timeless(tmp_path) == timeless(straight)
    one, other = (load_file(folder / "rl/hf/model.safetensors") for folder in (straight, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with log.open() as file:
        file.seek(before)
        calls = re.findall(r"(?<=to )(?:fall asleep|wake up tags \[\S+\])|weights finished", file.read())
    if more:
        turn = ["fall asleep", "wake up tags ['weights']", "weights finished", "wake up tags ['kv_cache']"]
        assert calls[:8] == 2 * turn  # the first samples, and what the trainer says to them; then a step each
        assert calls == len(calls) // 4 * turn
    else:
        assert set(calls) == {"weights finished"}


def test_a_step_that_trains_is_dropped(straight, forks, t1, tuned, server, tmp_path):
    """Asked to stop between its microbatches: the step's samples wait in the bank, the checkpoint comes at once."""
    arguments = options(tuned, tmp_path, **server, **MEASURED)
    stopped = forks.run(WORKERS / "stopped_worker.py", *arguments, timeout_s=600)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "rl/metrics.jsonl")] == [1]
    assert (tmp_path / "rl/checkpoints/step_00000001").is_dir()
    t1("rl", *arguments, "--resume")
    assert timeless(tmp_path) == timeless(straight)


def timeless(run_dir: Path, job: str = "rl") -> list[dict]:
    """The metrics of every step that do not depend on the machine's speed."""
    return [
        {
            k: v
            for k, v in row.items()
            if "second" not in k and "per_s" not in k and "idle/" not in k and "graders/" not in k
        }
        for row in rows(run_dir / job / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(t1, tuned, server, tmp_path_factory) -> Path:
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    t1("rl", *options(tuned, folder, **server, **MEASURED))
    return folder


def test_at_learning_rate_0_a_lag_changes_nothing(t1, tuned, server, tmp_path):
    """Batches asked one step ahead are then those of the loop on policy: the same numbers bit by bit, and versions."""
    still = {**server, "rl.steps": 4, "rl.optim.lr": 0}
    t1("rl", *options(tuned, tmp_path / "on policy", **still))
    t1("rl", *options(tuned, tmp_path / "ahead", **still, **{"rl.lag": 1}))
    on_policy, ahead = timeless(tmp_path / "on policy"), timeless(tmp_path / "ahead")
    assert [row.pop("oldest_version") for row in on_policy] == [0, 1, 2, 3]
    assert [row.pop("oldest_version") for row in ahead] == [0, 0, 1, 2]
    assert [row.pop("staleness") for row in on_policy] == [0, 0, 0, 0]
    assert [row.pop("staleness") for row in ahead] == [0, 1, 1, 1]
    assert ahead == on_policy


@pytest.fixture(scope="module")
def ahead(t1, tuned, server, tmp_path_factory) -> Path:
    """Six steps at a lag of 1 without a break, with groups asked in place of those that teach nothing."""
    folder = tmp_path_factory.mktemp("ahead")
    t1("rl", *options(tuned, folder, **server, **AHEAD))
    return folder


AHEAD = {"rl.steps": 6, "rl.lag": 1, "rl.refill": 2, "rl.checkpoint.keep": 2, "parallel.nproc_per_node": 1}


def test_a_lag_is_reproduced_through_a_stop_and_a_kill(ahead, start_t1, t1, tuned, server, tmp_path):
    """USR1 with a batch under way, then kill -9, each followed by a new process: the numbers of the unbroken run."""
    metrics = tmp_path / "rl/metrics.jsonl"
    arguments = options(tuned, tmp_path, **server, **AHEAD)
    for number, (sign, steps) in enumerate(((signal.SIGUSR1, 1), (signal.SIGKILL, 3))):
        process = start_t1("rl", *arguments, *["--resume"] * number, stderr=subprocess.PIPE)
        while process.poll() is None and not (metrics.exists() and len(rows(metrics)) >= steps):
            time.sleep(0.02)
        process.send_signal(sign)
        _, said = process.communicate(timeout=200)
        assert process.returncode == (75 if sign == signal.SIGUSR1 else -sign), said[-3000:]
    t1("rl", *arguments, "--resume")
    assert timeless(tmp_path) == timeless(ahead)
    assert [row["oldest_version"] for row in timeless(ahead)] == [0, 0, 1, 2, 3, 4]
    assert sum(row["refill/groups"] for row in timeless(ahead)) > 0
    one, other = (load_file(folder / "rl/hf/model.safetensors") for folder in (ahead, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", [{}, {"parallel.tensor": 2}], ids=["one process", "TP2"])
def test_a_stored_step_is_trained_again_without_servers(layout, ahead, t1):
    """From the checkpoint before it: bit by bit on the run's layout, within rounding on another."""
    changed = [part for name, value in layout.items() for part in (f"--{name}", str(value))]
    said = t1("replay", ahead, "--step", 6, "--profile", *changed, num_ranks=2 if layout else 1)
    if not layout:
        assert re.search(r"step 6: all [3-9]\d metrics are the run's, bit by bit", said), said
    trace = json.loads((ahead / "replay/step_6.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    for line in re.findall(r"^(?:loss|entropy|kl_sample|grad_norm) .*$", said, re.MULTILINE):
        assert float(line.split()[-1]) < 2e-3, line
    refused = t1("replay", ahead, "--step", 2, num_ranks=1, expect=1)
    assert "the samples of step 1 are not stored" in refused
    assert "steps 5 to 6 are" in refused


def test_a_batch_that_lost_all_servers_is_made_whole_by_the_weights_it_began_with(ahead, forks, tuned, tmp_path):
    """The trainer had gone on; the servers come back with the weights from before its step: the same numbers."""
    done = forks.run(WORKERS / "lost_servers_worker.py", *options(tuned, tmp_path, **AHEAD), timeout_s=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "it is made whole with the weights that it began with" in done.stderr
    assert timeless(tmp_path) == timeless(ahead)


def test_requests_under_way_go_on_with_new_weights(t1, tuned, server, tmp_path):
    """pause_mode keep: samples of several versions, none older than the lag, each logprob that of its weights."""
    still = {"rl.steps": 6, "rl.lag": 2, "rl.optim.lr": 0, "rollout.pause_mode": "keep", "sampling.max_new_tokens": 96}
    t1("rl", *options(tuned, tmp_path, **server, **still, **{"rl.checkpoint.every_steps": 6}))
    for row in rows(tmp_path / "rl/metrics.jsonl"):
        assert row["oldest_version"] >= row["step"] - 1 - 2
        assert row["logprob_diff"] < 1e-3
    kept = [row["weight_versions"] for row in rows(tmp_path / "rl/samples.jsonl")]
    assert any(len(versions) > 1 for versions in kept), kept


def test_samples_are_made_and_kept_without_training(t1, tuned, server, tmp_path):
    """The batches of RL's first steps, by an unchanged model; what is there is not asked again."""
    arguments = options(tuned, tmp_path, **server, **{"rl.steps": 2})
    assert "samples:" in t1("rollout", *arguments)
    made = rows(tmp_path / "rollout/metrics.jsonl")
    assert [row["step"] for row in made] == [1, 2]
    kept = sorted((tmp_path / "rollout/bank").iterdir())
    sizes = [path.stat().st_size for path in kept]
    t1("rollout", *arguments)
    assert [path.stat().st_size for path in kept] == sizes
    assert timeless(tmp_path, "rollout") == [{k: v for k, v in row.items() if "second" not in k} for row in made]


def test_a_run_is_measured_every_few_steps(straight, tuned):
    """Accuracy, snapshots, and the KL to the start: 0 there, then what transformers finds between the two models."""
    measured = {row["step"]: row for row in rows(straight / "rl/metrics.jsonl") if "kl_start" in row}
    assert list(measured) == [1, 3], "of the weights before the step, as the step's samples are"
    for step, row in measured.items():
        result = json.loads((straight / f"evaluate/step_{step - 1:06d}/heldout/summary.json").read_text())
        assert row["heldout/heldout"] == result["pass_at_1"]
    assert (straight / "evaluate/step_000004/heldout/summary.json").exists()
    assert measured[1]["kl_start"] == 0
    exported, last = (
        load_file(straight / "rl" / name / "model.safetensors") for name in ("hf", "snapshots/step_000004")
    )
    assert all(torch.equal(exported[name], last[name]) for name in exported)
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    policy, start = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (straight / "rl/snapshots/step_000002", tuned / "model")
    )
    ratios = []
    for row in [row for row in rows(straight / "rl/samples.jsonl") if row["step"] == 3][::8]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        end = "<|end|>" if row["finish_reason"] == "stop" else ""
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = tokenizer(prompt + row["response"] + end, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = [torch.log_softmax(m(ids).logits[0, :-1].double() / 1.2, -1) for m in (policy, start)]
        at = torch.arange(asked.shape[1] - 1, ids.shape[1] - 1)
        ratios.append(float((logprobs[0] - logprobs[1])[at, ids[0, at + 1]].sum()))
    assert len(ratios) == 2, "one a prompt"
    assert measured[3]["kl_start"] == pytest.approx(sum(ratios) / 2, abs=1e-4)


def test_a_package_of_the_users_trains_on_all_ranks(forks, tuned, server, tmp_path):
    """Its answer mode, penalty, loss, advantage and chat template; once its source has changed, a resume is refused."""
    shutil.copytree(PACKAGE, tmp_path / "extend")
    site = install(tmp_path / "site", tmp_path / "extend")
    questions = [{**row, "mode": "last_integer"} for row in rows(tuned / "rl.jsonl")[:200]]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    own = {"plugins": PLUGINS, "data.train": tmp_path / "questions.jsonl", "loss.token_loss": "t1_uncertain",
           "loss.advantage": "centered_ranks", "data.chat_template": "plain",
           "reward.penalties.enabled": "[apology]"}  # fmt: skip
    command = [WORKERS / "extended_worker.py", site, "rl", *options(tuned, tmp_path / "run", **server, **own)]
    done = forks.run(*command, "--rl.steps", 2, num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = rows(tmp_path / "run/rl/samples.jsonl")
    assert all(sample["reward"]["reason"].startswith(("the last of", "no whole number")) for sample in samples)
    thirds = {round(3 * sample["advantage"], 6) for sample in samples}
    assert thirds <= set(range(-3, 4)), "ranks of 4 samples"
    assert (tmp_path / "run/rl/hf/chat_template.jinja").read_text().startswith("{% for m in messages %}")
    with (site / "my_t1/losses.py").open("a") as file:
        file.write("\n# a change\n")
    refused = forks.run(*command, "--rl.steps", 3, "--resume", num_ranks=2)
    assert refused.returncode == 1
    assert "was made with other settings: plugins = ['my_t1.rewards " in refused.stderr


def test_without_a_kl_there_is_no_anchor(t1, tuned, server, tmp_path):
    """Nor in a checkpoint: it resumes so, and not with a KL. On policy every weight by sample is 1."""
    weighted = {"loss.importance": "gspo", "loss.ratio_max": 1.1, "loss.mask": "sequence", "loss.mask_min": 0.9}
    arguments = options(tuned, tmp_path, **server, **{"loss.kl_coef": 0}, **weighted)
    t1("rl", *arguments, "--rl.steps", 2)
    stored = tmp_path / "rl/checkpoints/step_00000002"
    assert not any("anchor" in name for name in FileSystemReader(stored).read_metadata().state_dict_metadata)
    refused = t1("rl", *arguments, "--loss.kl_coef", 0.1, "--resume", "--resume_with_changes", expect=1)
    assert "holds no anchor" in refused
    t1("rl", *arguments, "--rl.steps", 3, "--resume")
    metrics = rows(tmp_path / "rl/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert {name for row in metrics for name in row if name.startswith("kl_")} == {"kl_behaviour"}
    for row in metrics:
        assert row["weight"] == pytest.approx(1.0, abs=1e-5)
        assert row["effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
        assert row["clip_fraction"] == row["masked"] == 0
        assert abs(row["kl_behaviour"]) < 1e-9


def test_the_models_own_chains_teach_it_and_are_measured(t1, tuned, server, tmp_path):
    """Synthesis by the tiny model itself -> SFT -> evaluation before and after, compared -> scaling -> report."""
    url, key_file = json.loads(server["rollout.urls"])[0], server["rollout.key_file"]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(line + "\n" for line in (tuned / "rl.jsonl").read_text().splitlines()[:800]))
    endpoint = json.dumps({"tiny": {"urls": [url], "key_file": str(key_file)}})
    # Whatever the server held, these are the weights now. A first step of Adam is as large for noise as for a gradient.
    t1("rl", *options(tuned, tmp_path / "push", **server, **{"rl.steps": 1, "rl.optim.lr": 0}))
    synthesize = ["--config", ROOT / "examples/quickstart/synthesize.yaml", "--questions", questions,
                  "--endpoints", endpoint, "--out", tmp_path / "chains"]  # fmt: skip
    said = t1("synthesize", *synthesize)
    chains = rows(tmp_path / "chains/sft.jsonl")
    assert len(chains) >= 2, said  # the model has learned for 1000 steps: many of its chains are wrong
    for chain in chains:
        assert chain["response"].count("Try ") > 1
        assert ", no. " in chain["response"]
        assert chain["response"].endswith(f"\\boxed{{{chain['answer']}}}")
    measured = {**server, "evaluate.sampling.num_samples": 2, "scaling.budgets": "[16,48]"}
    sft = {"data.sft": tmp_path / "chains/sft.jsonl", "sft.batch_size": 2, "sft.max_steps": 60, "sft.epochs": 100}
    t1("sft", *options(tuned, tmp_path / "run", **sft))
    after = {"model.hf_path": tmp_path / "run/sft/hf"}
    t1("evaluate", *options(tuned, tmp_path / "run", **measured, label="before"))
    t1("evaluate", *options(tuned, tmp_path / "run", **{**measured, **after}, label="after"))
    evaluations = tmp_path / "run/evaluate"
    assert "permutation of runs" in t1("compare", evaluations / "before", evaluations / "after")
    first, second = (json.loads((evaluations / x / "heldout/summary.json").read_text()) for x in ("before", "after"))
    assert second["pass_at_1"] > first["pass_at_1"] - 0.05, "chains of its own have not harmed it"
    t1("scaling", *options(tuned, tmp_path / "run", **{**measured, **after}, label="after"))
    t1("report", tmp_path / "run")


@pytest.mark.parametrize("command", ["evaluate", "scaling"])
def test_killed_while_measuring_it_resumes_to_the_same_files(command, start_t1, t1, tuned, server, tmp_path):
    """kill -9 in the middle of `t1 evaluate` and `t1 scaling`: the same files as in one go, finished work kept."""
    small = {"evaluate.sampling.num_samples": 8, "scaling.sampling.num_samples": 8, "scaling.budgets": "[16,48]"}
    names = {
        "evaluate": ("heldout/responses.part.jsonl", "heldout/responses.jsonl", "heldout/settings.json"),
        "scaling": ("thinkings.part.jsonl", "thinkings.jsonl", "forced.jsonl", "points.json", "majority.json"),
    }
    part, *final = names[command]
    t1(command, *options(tuned, tmp_path, **server, **small, label="whole"))
    cut = options(tuned, tmp_path, **server, **small, label="cut")
    process = start_t1(command, *cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / command / "cut" / part
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 20):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert path.exists(), "it was over before the kill"
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    t1(command, *cut, "--resume")
    for name in final:
        assert (tmp_path / command / "cut" / name).read_text() == (tmp_path / command / "whole" / name).read_text()
    assert set(kept) <= set((tmp_path / command / "cut" / final[0]).read_text().splitlines(keepends=True))


def test_a_killed_server_is_replaced(start_t1, t1, tuned, tmp_path):
    """Of two servers one is killed in the middle: training goes on and the server comes back. `t1 watch` shows it."""
    arguments = options(tuned, tmp_path, **{"rollout.num_servers": 2, "rl.steps": 20})
    process = start_t1("rl", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "rl/metrics.jsonl"
    output: list[str] = []
    for line in process.stdout:
        output.append(line)
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 1:
            break
    victim = next(
        child for child in psutil.Process(process.pid).children(recursive=True)
        if child.status() != "zombie" and "vllm" in " ".join(child.cmdline()) and "--port" in child.cmdline()
    )  # fmt: skip
    victim.kill()
    rest, _ = process.communicate(timeout=250)
    assert process.returncode == 0, "".join(output) + rest[-3000:]
    assert "was lost and is started again" in rest
    said = t1("watch", tmp_path, "--once")
    assert "rl step 20 of 20" in said
    assert said.count("127.0.0.1:") >= 2, "its servers"
    assert "is started again: it gets the current weights first" in " ".join(said.split())
    assert [row["step"] for row in rows(metrics)] == list(range(1, 21))


def test_the_exported_model_answers_as_the_trained_one(t1, tuned, server, straight, tmp_path):
    """Greedy answers of the export in transformers are those of vLLM serving the trained weights."""
    same = {"rl.prompts_per_step": 2, "sampling.num_samples": 8, "parallel.max_tokens_per_microbatch": 256}
    t1("rl", *options(tuned, tmp_path, **server, **same, **{"rl.steps": 2}))
    for row, measured in zip(timeless(tmp_path), timeless(straight), strict=False):
        assert row == {name: measured[name] for name in row}, "what is measured meanwhile changes nothing"
    exported = tmp_path / "rl/hf"
    greedy = {"temperature": 0, "num_samples": 1, "top_p": 1}
    sampling = {f"evaluate.sampling.{name}": value for name, value in greedy.items()}
    t1("evaluate", *options(tuned, tmp_path, **server, **sampling, **{"model.hf_path": exported, "label": "greedy"}))
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for row in rows(tmp_path / "evaluate/greedy/heldout/responses.jsonl")[:5]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        tokens = model.generate(**prompt, max_new_tokens=row["num_tokens"], do_sample=False)
        assert tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == row["response"]
