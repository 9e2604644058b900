"""What a person who mistypes an option is told: each fault once, by its full name, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_t1.cli.options import read
from megatron_t1.config import Config, GradeConfig, LogprobsConfig, dump
from megatron_t1.evaluation.config import EvaluateConfig, SetSampling
from megatron_t1.synthesize.config import SynthesizeConfig

NO_URL = "endpoints.big.url is not a setting; did you mean endpoints.big.urls?"


def told(cls: type, *arguments: str) -> list[str]:
    with pytest.raises(ValueError, match=r".+") as error:
        read(cls, list(arguments))
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--endpoints", "{big: {url: [http://x]}}"], [NO_URL]),
        (["--endpoints.big.url", "[http://x]"], [NO_URL]),
        (["--endpoints", "{big: {urls: [x]}}"], ["endpoints.big.urls = ['x'] must start with http:// or https://"]),
        (["--endpoints", "{big: x}"], ["endpoints.big = 'x' must be a section with settings of its own"]),
        (["--endpoints", "big"], ["endpoints = 'big' must be values by name: {name: value}"]),
        (["--endpoints.big.max_retries", "-1"], ["endpoints.big.max_retries = -1 must be at least 0"]),
        ([], ["endpoints = {} must name one, or give `model`, a folder to serve here"]),
    ],
)
def test_a_fault_of_an_endpoint_is_told_once_by_its_full_name(arguments: list[str], lines: list[str]) -> None:
    assert told(SynthesizeConfig, "--questions", "q.jsonl", "--out", "out", *arguments) == lines


def test_options_of_one_named_section_add_up_and_the_whole_replaces_it() -> None:
    each = ["--sampling_by_set.a.top_p", "0.5", "--sampling_by_set.a.stop", "[x]", "--sampling_by_set.b.min_p", "0.1"]
    own = read(EvaluateConfig, each).sampling_by_set
    assert own == {"a": SetSampling(top_p=0.5, stop=("x",)), "b": SetSampling(min_p=0.1)}
    assert read(EvaluateConfig, [*each, "--sampling_by_set", "{c: {}}"]).sampling_by_set == {"c": SetSampling()}


def test_good_endpoints_are_kept_beside_another_fault() -> None:
    good = ["--endpoints", "{big: {urls: [http://x]}}", "--critique_with", "big"]
    problems = told(SynthesizeConfig, "--questions", "q.jsonl", "--out", "out", *good, "--seeed", "3")
    assert problems == ["seeed is not a setting; did you mean seed?"]


def test_options_into_a_setting_with_names_of_its_own_have_types(tmp_path: Path) -> None:
    cfg = read(Config, [
        "--model.transformer.deterministic_mode", "false", "--rollout.vllm_args.x", "1e-6",
        "--rollout.vllm_args.enable-prefix-caching", "false", "--rollout.vllm_args.seed", "3",
        "--rollout.vllm_env.A", "1", "--evaluate.endpoint.extra_body.top_k", "20",
        "--evaluate.endpoint.extra_body.a.b", "[x]",
    ])  # fmt: skip
    assert cfg.model.transformer == {"deterministic_mode": False}
    assert cfg.rollout.vllm_args == {"x": 1e-6, "enable-prefix-caching": False, "seed": 3}
    assert cfg.rollout.vllm_env == {"A": "1"}
    assert cfg.evaluate.endpoint.extra_body == {"top_k": 20, "a": {"b": ["x"]}}
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert read(Config, ["--config", str(tmp_path / "config.yaml")]) == cfg


def test_a_needed_field_that_is_refused_is_told_alone(tmp_path: Path) -> None:
    (problem,) = told(GradeConfig, "--input", str(tmp_path / "nowhere.jsonl"), "--output", "out.jsonl")
    assert problem.startswith("input = ")
    assert "nowhere.jsonl' must be a file" in problem


def test_dotted_names_in_a_file_are_told_as_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("rl.steps: 5\nrl: {optim.lr: 1e-6}\nrl.optim.lr: 1e-6\nrl.stepz: 5\nevaluate.num_samples.gpqa: 3\n")
    assert told(Config, "--config", str(file)) == [
        "rl.steps is written by sections in a file: rl: {steps: ...}",
        "rl.optim.lr is written by sections in a file: optim: {lr: ...}",
        "rl.optim.lr is written by sections in a file: rl: {optim: {lr: ...}}",
        "rl.stepz is not a setting",
        "evaluate.num_samples.gpqa is written by sections in a file: evaluate: {num_samples: {gpqa: ...}}",
    ]


def test_the_next_option_is_no_value() -> None:
    assert told(Config, "--run_dir", "--resume") == ["--run_dir needs a value"]
    assert read(Config, ["--run_dir=--resume"]).run_dir == "--resume"


def test_a_single_value_for_a_list_is_shown_as_a_list() -> None:
    assert told(EvaluateConfig, "--sets", "math500") == ["sets = 'math500' must be a list: [math500]"]


def test_paths_are_written_out_as_a_shell_does_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    words = {
        "run_dir": ("~/runs/x", "/home/me/runs/x"),
        "model.hf_path": ("$SCRATCH/m", "/scratch/me/m"),
        "data.sft": ("/data/${SCRATCH}x/a.jsonl", "/data//scratch/mex/a.jsonl"),
        "data.train": ("$SCRATCH", "/scratch/me"),
        "data.heldout": ("a~b/c.jsonl", "a~b/c.jsonl"),
        "data.system_prompt": ("Give 1/2 as $x$ or $SCRATCH/y.", "Give 1/2 as $x$ or $SCRATCH/y."),
        "curate.output": ("/data/my runs/${SCRATCH}x/p.jsonl", "/data/my runs//scratch/mex/p.jsonl"),
        "scaling.summary_prompt": (
            "/think {question} {thinking} 1/$SCRATCH",
            "/think {question} {thinking} 1/$SCRATCH",
        ),
        "rollout.registry": ("~/my runs/servers", "/home/me/my runs/servers"),
        "evaluate.sets": ("[~/a.jsonl, math500]", ("/home/me/a.jsonl", "math500")),
        "rollout.urls": ("[http://host/$SCRATCH]", ("http://host/$SCRATCH",)),
    }
    cfg = read(Config, [f"--{name}={word}" for name, (word, _) in words.items()])
    for name, (_, meant) in words.items():
        section, _, field = name.rpartition(".")
        assert getattr(getattr(cfg, section) if section else cfg, field) == meant
    with pytest.raises(ValueError, match=r"run_dir = '\$NOWHERE/x' names \$NOWHERE, which the environment"):
        read(Config, ["--run_dir=$NOWHERE/x"])


def test_what_can_not_be_written_to_is_told_before_anything_is_made(tmp_path: Path) -> None:
    """An unset variable of a shell is an empty word: the run's files would lie in the current folder."""
    file = tmp_path / "file"
    file.touch()
    for wrong, why in (("", "must be a folder to write to"), (file, f"{file} is a file"), (file / "a/b", "is a file")):
        (problem,) = told(Config, f"--run_dir={wrong}")
        assert problem.startswith("run_dir = ")
        assert problem.endswith(why)
    for good in (tmp_path, tmp_path / "new/x", "runs/x", "."):
        read(Config, ["--run_dir", str(good)])
    given = ["--input", str(file), "--output"]
    for cls, words, field in (
        (GradeConfig, [*given, str(tmp_path)], "output"),
        (GradeConfig, [*given, ""], "output"),
        (LogprobsConfig, ["--model", "m", *given, str(tmp_path)], "output"),
        (Config, ["--curate.output", str(tmp_path)], "curate.output"),
    ):
        (problem,) = told(cls, *words)
        assert problem.startswith(f"{field} = ")
        assert problem.endswith("must be a file to write: this is a folder")


@pytest.mark.parametrize("seed", [-1, 2**32, 5_000_000_000])
def test_a_seed_that_no_generator_takes_is_told_at_once(seed: int) -> None:
    assert told(Config, "--seed", str(seed)) == [f"seed = {seed} must lie in [0, {2**32 - 1}]"]
    for good in (0, 2**32 - 1):
        assert read(Config, ["--seed", str(good)]).seed == good


@pytest.mark.parametrize("label", ["Qwen/Qwen2.5-7B", "step_10/final", "..", ".", ".hidden", "a\\b", "a\nb"])
def test_a_label_that_would_be_a_path_is_refused(label):
    with pytest.raises(ValueError, match=r"label = .* must be a name without /"):
        read(Config, ["--label", label])


def test_labels_that_are_names_stay():
    for label in ("", "step_10", "Qwen2.5-7B (ours)", "ü"):
        assert read(Config, ["--label", label]).label == label


def test_changes_are_taken_on_resume_alone():
    with pytest.raises(ValueError, match="resume_with_changes = True needs --resume too"):
        read(Config, ["--resume_with_changes"])
