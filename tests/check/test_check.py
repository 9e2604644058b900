"""`t1 check`: every violation at once, each with its name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.published import write_config
from megatron_t1.check.check import check
from megatron_t1.check.findings import Findings
from megatron_t1.check.machines import Machines
from megatron_t1.cli.main import main
from megatron_t1.cli.options import parse, read
from megatron_t1.config import Config, dump
from tests.forks import ROOT
from tests.tiny import make_tiny_qwen2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_tiny_qwen2(folder / "model")
    for name, asked in (("rl", "1+1?"), ("heldout", "1+2?")):
        questions = [{"id": str(i), "prompt": asked, "answer": "2"} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "sft.jsonl").write_text(json.dumps({"prompt": "1+1?", "response": "\\boxed{2}"}) + "\n")
    return folder


def found_in(task: Path, *options: object, command: str = "rl", machines: Machines | None = None) -> Findings:
    fixed = {"model.hf_path": task / "model", "run_dir": task / "run", "data.train": task / "rl.jsonl",
             "data.sft": task / "sft.jsonl", "data.heldout": task / "heldout.jsonl", "model.dtype": "float32",
             "sampling.max_new_tokens": 64, "evaluate.sampling.max_new_tokens": 64}  # fmt: skip
    words = [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
    cfg, problems = parse(Config, [*words, *map(str, options)])
    found = Findings(problems=problems)
    return check(cfg, command, machines or Machines(ranks_per_node=1), found) if cfg else found


def test_a_good_configuration_has_no_problem(task: Path) -> None:
    found = found_in(task)
    assert found.problems == []
    assert found.warnings == []
    facts = "\n".join(found.facts)
    for fact in (
        "responses end with token 258",
        "data.train: 40 questions",
        "memory of the fullest trainer GPU",
        "time of a step",
    ):
        assert fact in facts


@pytest.mark.parametrize(
    "options",
    [
        ["--scaling.sampling.num_samples", "4", "--evaluate.sampling", "{max_new_tokens: 100}"],  # the rest stays
        ["--rl.optim.warmup_steps", "3", "--resume", "true", "--model.transformer", "{recompute_granularity: full}"],
        ["--data.system_prompt", "Answer: yes", "--run_dir", "123", "--evaluate.instruction", ""],
        ["--evaluate.sets", "[math500, 'a.jsonl']", "--rollout.max_model_len", "null", "--rollout.urls=[http://x]"],
        ["--config", str(ROOT / "examples/qwen2.5-32b/rl.yaml"), "--scaling.budgets", "[1, 2]"],
    ],
)
def test_what_is_dumped_reads_the_same(task: Path, options: list[str]) -> None:
    options = ["--model.hf_path", str(task / "model"), *options]
    job = read(Config, options)
    file = task / "config.yaml"
    file.write_text(dump(job))
    assert read(Config, ["--config", str(file)]) == job


def test_every_violation_is_told_at_once(task: Path) -> None:
    found = found_in(
        task,
        *("--rl.stepz", 3, "--rl.optim.learning_rate", 1, "--rollot.tp", 2),
        *("--loss.kl_coef", -1, "--loss.entropy_coef", -1, "--anchor.decay", 3, "--rollout.num_servers", "many"),
        *("--parallel.tensor", 3, "--parallel.pipeline", 4, "--sampling.max_new_tokens", 20000),
        *("--data.train", "nowhere.jsonl", "--rollout.tp", 3, "--model.transformer", "{hidden_size: 3}"),
        *("--rollout.vllm_args", "{logprobs-mode: raw_logprobs}", "--sft", 3),
        *("--evaluate.sampling.temperature", -1, "--rl.optim.lr", -1, "--reward.deadline_s", 0),
    )
    text = "\n".join(found.problems)
    for problem in (
        "rl.stepz is not a setting; did you mean rl.steps?",
        "rl.optim.learning_rate is not a setting",
        "rollot is not a setting; did you mean rollout?",
        "loss.kl_coef = -1.0 must be 0 or more",
        "loss.entropy_coef = -1.0 must be 0 or more",
        "anchor.decay = 3.0 must lie in [0, 1]",
        "rollout.num_servers = 'many'",
        "num_attention_heads = 4 does not divide by parallel.tensor = 3",
        "num_query_groups = 2 neither divides parallel.tensor = 3",
        "1 trainer processes do not divide by parallel.tensor x parallel.context x parallel.pipeline = 3 x 1 x 4",
        "nowhere.jsonl",
        "rollout.tp = 3 does not divide the 4 attention heads",
        "model.transformer = {'hidden_size': 3} sets ['hidden_size']",
        "logprobs-mode = raw_logprobs",
        "the servers' context of 1024 tokens is too short",
        "beyond the model's 1024 positions by YaRN",
        "does not fit into a microbatch of 16384",
        "sft = 3 must be a section",
        "evaluate.sampling.temperature = -1.0 must be 0",
        "rl.optim.lr = -1.0 must be at least 0",
        "reward.deadline_s = 0.0 must",
    ):
        assert problem in text, problem


def test_missing_weights_a_layout_across_nodes_and_bad_sets_are_told(task: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(task / "model", model)
    (model / "model.safetensors").unlink()
    assert any("safetensors" in problem for problem in found_in(task, "--model.hf_path", model).problems)
    for vllm_gpus in (None, 1):  # half of one, rounded down, and all
        one = Machines(gpus_per_node=1, vllm_gpus=vllm_gpus)
        assert any("one side has none" in problem for problem in found_in(task, machines=one).problems)
        shares = found_in(task, "--rollout.share_gpus", "true", machines=replace(one, share_gpus=True))
        assert not any("side" in problem for problem in shares.problems)
    machines = Machines(nodes=2, gpus_per_node=4)  # half of them for vLLM
    found = found_in(task, "--parallel.tensor", 4, machines=machines)
    assert any("parallel.tensor = 4 reaches over nodes of 2 trainer" in warning for warning in found.warnings)
    url = ["--evaluate.endpoint.urls", "[http://127.0.0.1:9/v1]"]
    for options, problem in (
        ([*url, "--evaluate.sets", "[math50]"], "set 'math50' is none of"),
        ([*url, "--evaluate.endpoint.key_env", "NO_SUCH_KEY"], "key_env = NO_SUCH_KEY"),
        (["--evaluate.responses", tmp_path / "none.jsonl"], "none.jsonl does not exist"),
        ([], "give model.hf_path, evaluate.endpoint.urls or evaluate.responses"),
    ):
        found = found_in(task, "--model.hf_path", "", *options, command="evaluate")
        assert any(problem in text for text in found.problems), found.problems


def test_the_named_set_is_looked_for_in_place_of_held_out_questions(task: Path) -> None:
    ours = ["--data.heldout", "nowhere.jsonl", "--evaluate.sets", f"[{task / 'heldout.jsonl'}]"]
    found = found_in(task, *ours, command="evaluate")
    assert found.problems == []
    assert any("set heldout: 40 questions" in fact for fact in found.facts)
    found = found_in(task, "--evaluate.sets", "[nowhere.jsonl]", command="evaluate")
    assert any("nowhere.jsonl" in problem for problem in found.problems)


@pytest.mark.parametrize("command", ["rl", "evaluate"])
def test_the_context_holds_every_sets_own_sampling(task: Path, tmp_path: Path, command: str) -> None:
    """Each with its own longest prompt; a set that is not asked counts for nothing."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"id": "0", "prompt": "1+2?" + " 1" * 200, "answer": "3"}) + "\n")
    asks = ["--rl.measure_every", 1, "--rollout.max_model_len", 700, "--evaluate.sets"]
    own = ["--evaluate.sampling_by_set", "{short: {max_new_tokens: 640}}"]
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"id": "0", "prompt": "1+3?", "answer": "4"}) + "\n")
    assert found_in(task, *asks, f"[{long}, {short}]", *own, command=command).problems == []
    (problem,) = found_in(task, *asks, f"[{long}, {short}]", *own[:1], "{short: {max_new_tokens: 700}}",
                          command=command).problems  # fmt: skip
    assert "evaluate.sampling_by_set.short.max_new_tokens needs 7" in problem
    (problem,) = found_in(task, *asks, f"[{long}, {short}]", *own[:1], "{long: {max_new_tokens: 640}}",
                          command=command).problems  # fmt: skip
    assert "evaluate.sampling_by_set.long.max_new_tokens needs" in problem
    asks += [f"[{short}]", *own, "--data.heldout", long]
    assert found_in(task, *asks, command=command).problems == []
    unasked = ["--rollout.max_model_len", 300, "--data.heldout", long]
    assert found_in(task, *unasked).problems == []


def test_biased_sampling_and_mixed_precision_are_warned_of(task: Path) -> None:
    found = found_in(
        task, "--sampling.top_p", 0.9, "--sampling.min_p", 0.1, "--sampling.top_k", 20, "--rollout.dtype", "bfloat16"
    )
    assert found.problems == []
    for warning in (
        "sampling.top_p = 0.9 cuts",
        "sampling.min_p = 0.1 cuts",
        "sampling.top_k = 20 cuts",
        "rollout.dtype = bfloat16",
    ):
        assert any(warning in text for text in found.warnings), warning


def test_bad_lines_and_ends_are_named(task: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((task / "rl.jsonl").read_text() + "not json\n")
    assert f"{bad}:41: not valid JSON" in "\n".join(found_in(task, "--data.train", bad).problems)
    model = make_tiny_qwen2(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    found = found_in(task, "--model.hf_path", model)
    assert "has 320 tokens and config.json a vocab_size of 300" in "\n".join(found.problems)
    assert "ends responses with [0, 1]" in "\n".join(found.warnings)


def test_questions_that_nobody_can_answer_right_are_warned_of(task: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    lost = {"id": "lost", "prompt": "What is half of 1?", "answer": "\\frac{1}{"}
    train.write_text((task / "rl.jsonl").read_text() + json.dumps(lost) + "\n")
    found = found_in(task, "--data.train", train)
    assert found.problems == []
    (told,) = (text for text in found.warnings if "can be right" in text)
    assert told.startswith("data.train: no response to 1 of its 41 questions can be right")
    assert "lost (\\frac{1}{)" in told


def test_more_ranks_than_gpus_are_told(task: Path) -> None:
    """Also with the GPUs of the servers beside them."""
    for machines, fits in (
        (Machines(ranks_per_node=5), False),
        (Machines(ranks_per_node=4), True),
        (Machines(nodes=2, vllm_nodes=1, ranks_per_node=8), True),
        (Machines(nodes=2, vllm_nodes=1, ranks_per_node=16), False),
        (Machines(ranks_per_node=8, share_gpus=True), True),
    ):
        found = found_in(task, "--rollout.share_gpus", str(machines.share_gpus).lower(), machines=machines)
        assert fits == (not any("trainer processes on a node and" in problem for problem in found.problems)), machines


def test_servers_that_no_node_has_the_gpus_for_are_told(task: Path) -> None:
    for machines, command, problem in (
        (Machines(nodes=2, vllm_nodes=1), "rl", False),
        (Machines(nodes=2, vllm_nodes=1, gpus_per_node=2), "rl", True),
        (Machines(nodes=2, gpus_per_node=4), "rl", True),
        (Machines(nodes=2, gpus_per_node=4), "evaluate", False),
        (Machines(nodes=2, gpus_per_node=4, share_gpus=True), "rl", False),
    ):
        shares = ("--rollout.share_gpus", str(machines.share_gpus).lower())
        found = found_in(task, "--rollout.tp", 4, *shares, command=command, machines=machines)
        assert problem == any("GPUs that each node has for vLLM" in text for text in found.problems), machines
    for wrong in ({"ranks_per_node": 0}, {"ranks_per_node": -2}, {"nodes": 0}):
        with pytest.raises(ValueError, match=r" = (0|-2) must be at least 1"):
            Machines(**wrong)


def test_what_a_run_has_written_needs_no_room_again(task: Path, tmp_path: Path) -> None:
    (tmp_path / "rl/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "rl/checkpoints/step_00000001/weights").write_bytes(bytes(20_000_000))
    (needed,) = [fact for fact in found_in(task, "--run_dir", tmp_path).facts if fact.startswith("disk:")]
    assert ", 0.02 are there, " in needed


def test_the_checkpoints_of_both_stages_need_room(task: Path) -> None:
    gigabytes = {}
    for command in ("sft", "rl", "run"):
        (needed,) = [fact for fact in found_in(task, command=command).facts if fact.startswith("disk:")]
        gigabytes[command] = float(re.search(r"take ([\d.]+) GB", needed)[1])
    assert gigabytes["run"] == pytest.approx(gigabytes["sft"] + gigabytes["rl"], abs=0.011)
    assert gigabytes["sft"] > 0


def test_rl_is_checked_with_all_that_it_reads(task: Path) -> None:
    for options, problem in (
        (["--data.heldout", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.heldout", task / "rl.jsonl"], "40 held-out questions are in data.train too"),
        (["--rl.measure_every", 5, "--evaluate.sets", "[math50]"], "set 'math50' is none of"),
        (
            ["--rl.measure_every", 5, "--evaluate.sampling.max_new_tokens", 1020],
            "evaluate.sampling.max_new_tokens needs",
        ),
        (["--rl.refill", 1, "--rl.prompts_per_step", 40], "rl.refill = 1.0 asks other questions"),
        (["--rl.prompts_per_step", 41], "rl.prompts_per_step = 41 is larger than the 40 questions"),
    ):
        found = found_in(task, *options)
        assert any(problem in text for text in found.problems), found.problems


_FULL = "recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1"


@pytest.mark.parametrize(
    ("transformer", "layout", "said"),
    [
        ("{recompute_granularity: full}", [], 'recompute_method must be "block" or "uniform"'),
        ("{recompute_granularity: full, recompute_method: uniform}", [], "recompute_num_layers must be between 1 and"),
        (
            "{recompute_granularity: full, recompute_method: block, recompute_num_layers: one}",
            [],
            "Expected `int | null`",
        ),
        ("{fp8: on}", ["--model.dtype", "bfloat16"], "model.transformer.fp8 = True must be e4m3, or hybrid"),
        ("{fp8: off}", ["--model.dtype", "bfloat16"], None),
        ("{moe_token_dispatcher_type: all}", [], "Invalid enum value 'all'"),
        ("{recompute_granularity: selective, recompute_modules: [core_atn]}", [], "{'core_atn'}"),
        ("{cpu_offloading: true, cpu_offloading_num_layers: 1}", ["--parallel.pipeline", "2"], "Pipeline parallelism"),
        (f"{{cpu_offloading: true, cpu_offloading_num_layers: 1, {_FULL}}}", [], "CPU offloading does not work when"),
        (f"{{distribute_saved_activations: true, {_FULL}}}", ["--parallel.tensor", "2"], None),
        (
            f"{{distribute_saved_activations: true, {_FULL}}}",
            ["--parallel.tensor", "2", "--parallel.sequence_parallel", "true"],
            "must be false when sequence parallel",
        ),
        (f"{{{_FULL}}}", ["--parallel.pipeline", "2"], None),
        ("{apply_rope_fusion: true, recompute_granularity: selective}", ["--model.dtype", "bfloat16"], None),
        ("{moe_router_fusion: true}", ["--model.dtype", "bfloat16"], None),
    ],
)
def test_what_megatron_refuses_is_told_before_it_does(
    task: Path, transformer: str, layout: list[str], said: str
) -> None:
    """What it looks for Transformer Engine for is left to the machines of the run, which may have it."""
    found = found_in(task, "--model.transformer", transformer, *layout, machines=Machines(ranks_per_node=4))
    assert len(found.problems) == (said is not None), found.problems
    assert said is None or said in found.problems[0]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples").glob("*-*/[rs][lf]*.yaml")), ids=lambda file: file.parent.name
)
def test_megatron_refuses_no_example(file: Path, task: Path, tmp_path: Path) -> None:
    model = write_config(tmp_path, file.parent.name)
    found = found_in(task, "--config", file, "--model.hf_path", model, machines=Machines(nodes=4, ranks_per_node=8))
    assert "Megatron refuses" not in "\n".join(found.problems)
    found = found_in(task, "--config", file, "--model.hf_path", model, "--model.transformer", "{fp8: hybrid}")
    assert "Megatron refuses" not in "\n".join(found.problems)


def test_the_command_fails_when_there_is_a_problem(task: Path, capsys) -> None:
    arguments = ["check", str(ROOT / "examples/quickstart/quickstart.yaml"), "--ranks_per_node", "2", "--for", "sft",
                 "--model.hf_path", str(task / "model"), "--data.sft", str(task / "sft.jsonl")]  # fmt: skip
    assert main([*arguments, "--sft.batch_size", "1", "--run_dir", str(task / "run")]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert main(["check", "--config", *arguments[1:]]) == 1
    assert "sft.batch_size = 16 is larger than the 1 lines" in capsys.readouterr().out


def test_a_model_that_could_not_answer_is_told_before_the_other_thinks(t1, task: Path, tmp_path: Path) -> None:
    short, none = make_tiny_qwen2(tmp_path / "short", max_position_embeddings=256), tmp_path / "none"
    small = ("--scaling.sampling.max_new_tokens", 64, "--scaling.budgets", "[16, 64]")
    long = ("--scaling.sampling.max_new_tokens", 400, "--scaling.budgets", "[16, 300]")
    for options, said in (
        ((*small, "--scaling.answer_model", short), None),
        ((*long, "--scaling.answer_model", task / "model"), None),
        ((*long, "--scaling.budgets", "[16, 100]", "--scaling.answer_model", short), None),
        ((*long, "--scaling.answer_model", short), f"{short}: the servers' context of 256 tokens is too short"),
        ((*small, "--rollout.max_model_len", 300, "--scaling.answer_model", short), "than the 256 positions of"),
        ((*small, "--scaling.answer_model", none), f"scaling.answer_model = {none}: "),
    ):
        problems = found_in(task, *options, command="scaling").problems
        assert len(problems) == (said is not None), problems
        assert said is None or said in problems[0]
    words = ("--model.hf_path", task / "model", "--data.heldout", task / "heldout.jsonl", "--run_dir", tmp_path / "run")
    assert "servers' context of 256 tokens" in t1("scaling", *words, *long, "--scaling.answer_model", short, expect=1)
    assert not (tmp_path / "run/logs").exists(), "a server was started"


def test_another_model_that_awaited_servers_would_have_to_serve_is_a_problem(task: Path) -> None:
    options = ("--scaling.answer_model", task / "model", "--scaling.sampling.max_new_tokens", 64)
    assert found_in(task, *options, command="scaling").problems == []
    (problem,) = found_in(task, *options, "--rollout.await_servers", 2, command="scaling").problems
    assert "scaling.answer_model" in problem
    assert "rollout.await_servers = 2" in problem
