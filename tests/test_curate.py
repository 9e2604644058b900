"""Curation: raw questions in, prompts for RL out; against a real vLLM server and the real grader."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_t1 import curate
from megatron_t1.config import CurateConfig
from megatron_t1.data.config import INSTRUCTION, DataConfig
from megatron_t1.data.prompts import load_prompts
from megatron_t1.data.template import Template
from megatron_t1.evaluation.samplers import sample_seed
from megatron_t1.fields import FieldError
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.answers.verify import verify
from megatron_t1.reward.config import PenaltyConfig, RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.servers import Servers
from megatron_t1.types import Sample
from tests.forks import ROOT

REWARD = RewardConfig(num_workers=1, penalties=PenaltyConfig(enabled=()))
SAMPLING = SamplingConfig(temperature=1.0, num_samples=4, max_new_tokens=3)
LONG = "A train leaves the station at noon and travels {} miles each hour for three hours. How far does it go?"
TRAIN = LONG.format(60)
RAW = [
    ("kept, with an answer", {"problem": "What is $1+1$?", "answer": 2}),
    ("kept, from the box", {"problem": "What is $2+3$?", "solution": r"First $\boxed{4}$? No: $\boxed{5}$."}),
    ("kept, GSM8K", {"question": "He has 3 apples and eats one. How many are left?", "answer": "3 - 1 = 2\n#### 2"}),
    ("kept, fields boxed", {"problem": "Half of $x$?", "answer": r"$\boxed{\frac{x}{2}}$"}),
    ("kept, drawing", {"problem": "[asy] label((A) 1 (B) 2 (C) 3); [/asy] How long is $AB$?", "answer": "7"}),
    ("kept, conditions", {"problem": "Find the least n with: a) n is odd. b) n > 6.", "answer": "7"}),
    ("kept, another field", {"problem": "", "question": "How many are 5 dozen?", "answer": "60"}),
    ("kept, money", {"problem": "What do 2 cost?", "answer": "$18\\$$"}),
    ("no_question", {"problem": "", "answer": "2"}),
    ("no_answer", {"problem": "What is it?", "solution": "Nobody knows."}),
    ("no_answer", {"problem": "What is it then?", "answer": "notfound"}),
    ("proof", {"problem": "Prove that $1+1=2$.", "answer": "2"}),
    ("multi_part", {"problem": "Let $x=1$. (a) Find $2x$. (b) Find $3x$.", "answer": "2, 3"}),
    ("multiple_choice", {"problem": "Which? (A) one (B) two (C) three", "answer": "two"}),
    ("needs_image", {"problem": "How long is it? ![](https://example.org/x.png)", "answer": "4"}),
    ("unverifiable", {"problem": "Why?", "answer": "Because the sum of the angles of a triangle is two right angles."}),
    ("unverifiable", {"problem": "How much?", "answer": r"\frac{1}{"}),
    ("contradicted", {"problem": "What is $7+8$?", "answer": "15"}),
    ("contradicted", {"problem": "What is 7+8?", "answer": "16"}),
    ("kept, twice", {"problem": "What is a half of 3?", "answer": r"\frac{3}{2}"}),
    ("duplicate", {"problem": "What is a half of $3$?", "answer": "1.5"}),
    ("kept, other formula", {"problem": r"Compute $(2+3)\cdot 4$.", "answer": "20"}),
    ("kept, other formula", {"problem": r"Compute $2+3\cdot 4$.", "answer": "14"}),
    ("kept, train", {"problem": LONG.format(60), "answer": "180"}),
    ("duplicate", {"problem": LONG.format("$60$").upper(), "answer": "180"}),
    ("near_duplicate", {"problem": LONG.format(60).replace("does it go", "does it drive"), "answer": "180.0"}),
    ("kept, other numbers", {"problem": LONG.format(70), "answer": "210"}),
    ("in_evaluation", {"problem": "what is 40+2", "answer": "42"}),
    ("near_evaluation", {"problem": "Think. How many of the first ten even numbers are prime? Say it.", "answer": "1"}),
]  # fmt: skip
EVALUATION = [
    {"problem": "What is $40+2$?", "prompt": "Do the exercise that now comes, and mind its units: What is $40+2$?"},
    {"messages": [{"role": "user", "content": "How many of the first ten even numbers are prime?"},
                  {"role": "assistant", "content": "1"}, {"role": "user", "content": "And how many of the next ten?"}]},
]  # fmt: skip


R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind, then provides the user with the answer. User: {} Assistant:"
)


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clean_says_why_each_question_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = _write(tmp_path / "raw.jsonl", [{"id": f"{i} {fate}", **row} for i, (fate, row) in enumerate(RAW)])
    cfg = CurateConfig(
        inputs=(inputs,), evaluation=(_write(tmp_path / "eval.jsonl", EVALUATION),), min_duplicate_similarity=0.7
    )
    cfg = replace(cfg, clean_only=True)
    counts = curate.prepare(cfg, REWARD, tmp_path / "out", resume=False)
    path, table = curate.select(cfg, tmp_path / "out", counts)
    fates = {row["id"]: row["reason"] for row in _read(tmp_path / "out/dropped.jsonl")}
    kept = _read(path)
    fates |= {row["id"]: "kept" for row in kept}
    wanted = {f"{i} {fate}": fate.split(",")[0] for i, (fate, _) in enumerate(RAW)}
    assert fates == wanted
    assert [row["answer"] for row in kept] == [
        "2", "5", "2", r"\frac{x}{2}", "7", "7", "60", r"18\$", r"\frac{3}{2}", "20", "14", "180", "210"
    ]  # fmt: skip
    assert kept[0]["prompt"].startswith("What is $1+1$?\n")
    assert kept[0]["source"] == "raw.jsonl"
    assert counts["read"] == len(RAW)
    for reason in set(wanted.values()) - {"kept"}:
        assert f"- {reason} " in table
    with pytest.raises(ValueError, match="--resume"):
        curate.prepare(cfg, REWARD, tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match=r"curate\.min_duplicate_similarity"):
        curate.prepare(replace(cfg, min_duplicate_similarity=0.9), REWARD, tmp_path / "out", resume=True)
    assert curate.prepare(cfg, REWARD, tmp_path / "out", resume=True) == counts
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("math.jsonl", {"problem": TRAIN}),
        ("aime.jsonl", {"Problem": TRAIN, "Answer": 204}),
        ("gpqa.csv", {"Question": TRAIN, "Correct Answer": "a", "Incorrect Answer 1": "b"}),
        ("own.jsonl", {"id": 1, "messages": [{"role": "user", "content": f"{TRAIN}\n\n{INSTRUCTION}"}], "answer": 1}),
        ("own.parquet", {"prompt": TRAIN}),
        ("other.jsonl", {"exercise": TRAIN}),
    ],
)
def test_no_layout_that_is_evaluated_comes_back(tmp_path: Path, name: str, row: dict) -> None:
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        _write(path, [row])
    field = "exercise" if "exercise" in row else "problem"
    alike = (
        TRAIN.replace("train", "cyclist").replace("three hours", "as long as it is light").replace("miles", "leagues")
    )
    texts = {"same": TRAIN.lower(), "asked": f"{TRAIN} {INSTRUCTION}", "alike": alike}
    inputs = _write(tmp_path / "raw.jsonl", [{"id": name, field: text, "answer": 1} for name, text in texts.items()])
    cfg = CurateConfig(inputs=(inputs,), evaluation=(str(path),), question_field=field)
    curate.prepare(cfg, REWARD, tmp_path / "out", resume=False)
    fates = {row["id"]: row["reason"] for row in _read(tmp_path / "out/dropped.jsonl")}
    assert fates == {"same": "in_evaluation", "asked": "in_evaluation"}


def test_files_of_one_name_without_ids_lose_no_question(tmp_path: Path) -> None:
    inputs = []
    for folder, answer in (("a", 11), ("b", 34), ("c", 71), ("d", 90)):
        (tmp_path / folder).mkdir()
        row = {"problem": f"A farm of kind {folder * 9} has how many hens?", "answer": answer}
        inputs.append(_write(tmp_path / folder / "train.jsonl", [row]))
    cfg = CurateConfig(inputs=tuple(inputs), clean_only=True)
    assert curate.clean(cfg, REWARD, tmp_path / "out", None)["read"] == 4
    kept = _read(tmp_path / "out/candidates.jsonl")
    assert sorted(row["answer"] for row in kept) == ["11", "34", "71", "90"]
    assert len({row["id"] for row in kept}) == 4


def test_a_set_by_name_comes_from_its_local_copy(tmp_path: Path) -> None:
    first = _read(ROOT / "tests/data/grader/math500.jsonl")[0]
    inputs = (_write(tmp_path / "raw.jsonl", [{"id": "same", "problem": first["problem"], "answer": first["answer"]}]),)
    cfg = CurateConfig(inputs=inputs, evaluation=("math500",))
    sets_dir = ROOT / "tests/data"
    assert curate.prepare(cfg, REWARD, tmp_path / "out", sets_dir=sets_dir, resume=False)["in_evaluation"] == 1
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert "math500" in settings["files"]
    _write(tmp_path / "math500.jsonl", [first])
    with pytest.raises(ValueError, match="has 1 questions, the set math500 has 500"):
        curate.prepare(cfg, REWARD, tmp_path / "other", sets_dir=tmp_path, resume=False)


def test_evaluation_questions_that_are_missing_are_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = (_write(tmp_path / "raw.jsonl", [{"problem": "What is 1+1?", "answer": 2}]),)
    cfg = CurateConfig(inputs=inputs, clean_only=True)
    evaluation = _write(tmp_path / "eval.jsonl", [{"problem": "2?", "answer": 1}, {"text": "3?"}, {"problem": " "}])
    with pytest.raises(ValueError, match=r"(?s)2 bad lines.*eval\.jsonl:2: no question.*eval\.jsonl:3: no question"):
        curate.prepare(replace(cfg, evaluation=(evaluation,)), REWARD, tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="set 'math50' is none of math500"):
        curate.prepare(replace(cfg, evaluation=("math50",)), REWARD, tmp_path / "out", resume=False)
    assert "warning" not in capsys.readouterr().err
    curate.prepare(cfg, REWARD, tmp_path / "out", resume=False)
    assert "warning: curate.evaluation is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "message"), [("{", "raw.jsonl:1: not valid JSON"), ("[1]", "raw.jsonl:1: must be")])
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "raw.jsonl").write_text(line + "\n")
    cfg = CurateConfig(inputs=(str(tmp_path / "raw.jsonl"),))
    with pytest.raises(ValueError, match=message):
        curate.prepare(cfg, REWARD, tmp_path, resume=False)


@pytest.mark.parametrize("template", ["{}", R1_ZERO, "Here comes one more of our 7 exercises for you all: {} (Unit 3)"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_prompts_template_hides_no_evaluation_question_and_condemns_no_other(
    tmp_path: Path, template: str, is_wrapped: bool
) -> None:
    sets = [json.loads(line)["problem"] for line in (ROOT / "tests/data/grader/math500.jsonl").read_text().splitlines()]
    asked, others = sets[:100], sets[100:200]
    held = _write(tmp_path / "held.jsonl", [{"id": i, "prompt": template.format(q)} for i, q in enumerate(asked)])
    rows = [{"problem": template.format(q) if is_wrapped else q, "answer": "7"} for q in (*asked, *others)]
    cfg = CurateConfig(inputs=(_write(tmp_path / "raw.jsonl", rows),), evaluation=(held,), keep_multiple_choice=True)
    curate.prepare(cfg, REWARD, tmp_path / "out", resume=False)
    fates = {int(row["id"].split("-")[1]) - 1: row["reason"] for row in _read(tmp_path / "out/dropped.jsonl")}
    assert [i for i in range(100) if fates.get(i) != "in_evaluation"] == []
    assert sum(fates.get(i) in ("in_evaluation", "near_evaluation") for i in range(100, 200)) <= 2


def test_raw_questions_come_in_any_table_that_sets_come_in(tmp_path: Path) -> None:
    """NuminaMath is Parquet on the hub."""
    rows = [{"problem": "What is 4+5?", "solution": r"It is $\boxed{9}$."}, {"problem": "Find 7-5.", "solution": "2"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw.parquet")
    (tmp_path / "raw.json").write_text(json.dumps(rows))
    (tmp_path / "raw.csv").write_text("problem,solution\n" + "".join(f"{a['problem']},{a['solution']}\n" for a in rows))
    _write(tmp_path / "raw", rows)
    for name in ("raw.parquet", "raw.json", "raw.csv", "raw"):
        cfg = CurateConfig(inputs=(str(tmp_path / name),))
        counts = curate.prepare(cfg, REWARD, tmp_path / f"of_{name}", resume=False)
        assert (counts["read"], counts["no_answer"]) == (2, 1)
        (kept,) = [json.loads(line) for line in (tmp_path / f"of_{name}/candidates.jsonl").read_text().splitlines()]
        assert (kept["id"], kept["answer"]) == ("raw-1", "9")


def test_a_file_whose_rows_all_ask_the_same_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"problem": "Solve the exercise.", "exercise": f"What is {number}+2?"} for number in range(3)]
    cfg = CurateConfig(inputs=(_write(tmp_path / "raw.jsonl", [{}]),), evaluation=(_write(tmp_path / "e.jsonl", rows),))
    for each in (cfg, replace(cfg, question_field="exercise")):
        curate.prepare(each, REWARD, tmp_path / each.question_field, resume=False)
    assert capsys.readouterr().err.count("e.jsonl has 3 rows and 1 different questions") == 1


def test_config_errors_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inputs = .*nothing\.jsonl"):
        CurateConfig(inputs=(str(tmp_path / "nothing.jsonl"),))
    with pytest.raises(ValueError, match="max_pass_rate = 30 must lie in"):
        CurateConfig(max_pass_rate=30)


@pytest.mark.parametrize("role", ["inputs", "evaluation"])
@pytest.mark.parametrize("spelling", ["the same", "relative", "link"])
def test_what_is_read_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    raw, other = _write(tmp_path / "raw.jsonl", [{}]), _write(tmp_path / "other.jsonl", [{}])
    (tmp_path / "link.jsonl").symlink_to(raw)
    output = {"the same": raw, "relative": "raw.jsonl", "link": str(tmp_path / "link.jsonl")}[spelling]
    with pytest.raises(FieldError, match=r"output = .* must be another file than .*raw\.jsonl"):
        CurateConfig(**{"inputs": (other,), role: (other, raw)}, output=output)
    CurateConfig(inputs=(raw,), output="prompts.jsonl")


@pytest.fixture(scope="module")
def template(tiny_dir: Path) -> Template:
    return Template(tiny_dir)


@pytest.fixture(scope="module")
def real(server: Servers, template: Template) -> Iterator[Rank0]:
    with Scorer(REWARD) as scorer, RolloutClient(server, template.tokenizer, vocab_size=320) as client:
        yield Rank0(server, client, scorer)


def _candidates(folder: Path, count: int) -> None:
    rows = [{"id": f"q{i}", "prompt": f"{i}?", "answer": "7", "source": "test"} for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "candidates.jsonl", rows)


def test_pass_rates_are_those_of_the_samples(real: Rank0, template: Template, tmp_path: Path) -> None:
    """Golds are made from what the model says, so that some questions are solved sometimes."""
    _candidates(tmp_path, 12)
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    said: list[list[Sample]] = [[] for _ in prompts]
    seeds = [sample_seed(5, prompt.id) for prompt in prompts]
    real.client.generate_each(prompts, [4] * 12, seeds, SAMPLING, None, lambda i, _, samples: said[i].extend(samples))
    golds = [next((s.text.strip() for s in samples if s.text.strip()), "7") for samples in said]
    rows = _read(tmp_path / "candidates.jsonl")
    _write(tmp_path / "candidates.jsonl", [{**row, "answer": gold} for row, gold in zip(rows, golds, strict=True)])
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    cfg = CurateConfig(max_pass_rate=0.25)
    curate.sample(SAMPLING, real, prompts, tmp_path, seed=5)
    rates = {row["id"]: row["pass_rate"] for row in _read(tmp_path / "sampled.jsonl")}
    expected = {
        prompt.id: sum(verify(gold, s.text).outcome == "correct" for s in samples) / 4
        for prompt, samples, gold in zip(prompts, said, golds, strict=True)
    }
    assert rates == expected
    cut = [[s.finish_reason == "length" for s in samples] for samples in said]
    assert {row["id"]: row["share_cut"] for row in _read(tmp_path / "sampled.jsonl")} == {
        prompt.id: sum(each) / 4 for prompt, each in zip(prompts, cut, strict=True)
    }
    assert max(rates.values()) > 0
    path, table = curate.select(cfg, tmp_path, {"read": 12})
    kept = {row["id"]: row["pass_rate"] for row in _read(path)}
    assert kept == {name: rate for name, rate in rates.items() if rate <= 0.25}
    assert load_prompts(path, template, DataConfig())[0].meta["pass_rate"] == next(iter(kept.values()))
    learnable, _ = curate.select(replace(cfg, drop_never_solved=True), tmp_path, {"read": 12})
    assert all(0 < row["pass_rate"] <= 0.25 for row in _read(learnable))
    dropped = {row["id"]: row["reason"] for row in _read(tmp_path / "dropped.jsonl")}
    out = {name: rate for name, rate in rates.items() if not 0 < rate <= 0.25}
    assert dropped == {name: "too_easy" if rate else "never_solved" for name, rate in out.items()}
    assert "kept" in table
    assert f"{sum(map(sum, cut)) / 48:.1%} of the samples were cut" in table


def test_what_is_done_is_not_asked_again(
    real: Rank0, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _candidates(tmp_path, 5)
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
    whole = sorted(_read(tmp_path / "sampled.jsonl"), key=lambda row: row["id"])
    lines = (tmp_path / "sampled.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sampled.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # killed while writing the third
    asked = []
    ask = real.client.generate_each
    monkeypatch.setattr(real.client, "generate_each", lambda p, *a: (asked.extend(p), ask(p, *a))[1])
    curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
    assert {p.id for p in asked} == {p.id for p in prompts} - {json.loads(line)["id"] for line in lines[:2]}
    assert sorted(_read(tmp_path / "sampled.jsonl"), key=lambda row: row["id"]) == whole
    with pytest.raises(ValueError, match="another run_dir"):
        curate.sample(SAMPLING, real, prompts, tmp_path, seed=2)
    asked_otherwise = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig(system_prompt="Be brief."))
    with pytest.raises(ValueError, match="other prompts: give another run_dir"):
        curate.sample(SAMPLING, real, asked_otherwise, tmp_path, seed=1)


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    real: Rank0, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _candidates(tmp_path, 6)
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    ask = real.client.generate_each

    def cut(*given: Any) -> None:
        *asked, note = given
        done: Counter[int] = Counter()

        def noted(i: int, j: int, samples: list[Sample]) -> None:
            done[i] += len(samples)
            if sum(count == SAMPLING.num_samples for count in done.values()) <= 2:
                note(i, j, samples)
            elif not os.environ.get("CUT"):
                monkeypatch.setenv("CUT", "once")  # a second would cut the first
                os.kill(os.getpid(), signal.SIGINT)  # this is the client's thread: the main one gets it

        ask(*asked, noted)

    monkeypatch.setattr(real.client, "generate_each", cut)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 6 questions are kept in .*sampled.jsonl; .* --resume"):
        curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
    assert len(_read(tmp_path / "sampled.jsonl")) == 2


def test_a_prompt_that_does_not_fit_is_counted(real: Rank0, template: Template, tmp_path: Path) -> None:
    _candidates(tmp_path, 1)
    rows = _read(tmp_path / "candidates.jsonl")
    _write(tmp_path / "candidates.jsonl", [*rows, {**rows[0], "id": "long", "prompt": "x" * 600}])
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    cfg = CurateConfig(max_pass_rate=1.0)
    curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
    path, table = curate.select(cfg, tmp_path, {"read": 2})
    assert [row["id"] for row in _read(path)] == ["q0"]
    assert "- too_long " in table


def test_a_prompt_that_fits_after_all_is_asked(
    real: Rank0, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _candidates(tmp_path, 2)
    prompts = load_prompts(tmp_path / "candidates.jsonl", template, DataConfig())
    with monkeypatch.context() as patch:
        for server in real.servers.usable():
            patch.setattr(server, "max_model_len", len(prompts[0].token_ids))
        for _ in range(2):  # and they are counted once, however often they do not fit
            curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
            assert [row["pass_rate"] for row in _read(tmp_path / "sampled.jsonl")] == [None, None]
    curate.sample(SAMPLING, real, prompts, tmp_path, seed=1)
    assert {row["id"] for row in _read(tmp_path / "sampled.jsonl") if row["pass_rate"] is not None} == {"q0", "q1"}


@pytest.mark.timeout(900)
def test_the_command_killed_and_resumed_ends_as_if_it_had_not_been(
    real: Rank0, server: Servers, start_t1, t1, template: Template, tiny_dir: Path, tmp_path: Path
) -> None:
    raw = _write(tmp_path / "raw.jsonl", [{"id": f"q{i}", "problem": f"{i}?", "answer": i} for i in range(40)])
    folder = tmp_path / "run/curate"
    arguments = [
        "curate", "--run_dir", tmp_path / "run", "--model.hf_path", tiny_dir,
        "--rollout.urls", json.dumps([server.all[0].url]), "--rollout.key_file", server.run_dir / "server_key",
        "--curate.inputs", json.dumps([raw]), "--sampling.max_new_tokens", 16,
        "--rollout.max_num_seqs", 32, "--rollout.device", "cpu",
        "--curate.output", tmp_path / "prompts.jsonl", "--reward.num_workers", 1, "--model.dtype", "float32",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = start_t1(*arguments, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and not (folder / "sampled.jsonl").exists():
            time.sleep(0.05)
        while process.poll() is None and (folder / "sampled.jsonl").read_text().count("\n") < 3:
            time.sleep(0.01)
        with_kill = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert with_kill, (tmp_path / "log").read_text()[-3000:]
    finished = (folder / "sampled.jsonl").read_text().rpartition("\n")[0].splitlines()
    assert 3 <= len(finished) < 40
    output = t1(*arguments, "--resume")
    assert output.split()[:2] == ["read", "40"]
    rows = (folder / "sampled.jsonl").read_text().splitlines()
    assert rows[: len(finished)] == finished
    assert len({json.loads(row)["id"] for row in rows}) == len(rows) == 40
    # The same without an interruption. The command left its model's weights, under its own version, in the server.
    pushed = int(server.all[0].call("GET", "/weight_info", timeout_s=60)["weight_version"])
    server.all[0].version = server.required_version = pushed
    prompts = load_prompts(folder / "candidates.jsonl", template, DataConfig())
    curate.sample(SamplingConfig(num_samples=16, max_new_tokens=16), real, prompts, tmp_path / "whole", seed=0)
    whole = {row["id"]: row for row in _read(tmp_path / "whole/sampled.jsonl")}
    assert whole == {row["id"]: row for row in map(json.loads, rows)}
    (tmp_path / "whole/candidates.jsonl").write_text((folder / "candidates.jsonl").read_text())
    path, _ = curate.select(CurateConfig(), tmp_path / "whole", {"read": 40})
    assert path.read_text() == (tmp_path / "prompts.jsonl").read_text()


def test_a_curation_that_keeps_nothing_leaves_no_file_that_a_chain_takes_for_prompts(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"problem": "Prove that 1 + 1 = 2.", "answer": ""}) + "\n")
    cfg = CurateConfig(inputs=(str(raw),), clean_only=True)
    counts = curate.prepare(cfg, RewardConfig(num_workers=1), tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match=r"no question is kept, and .*prompts.jsonl is not written:\nread +1"):
        curate.select(cfg, tmp_path / "out", counts)
    assert not (tmp_path / "out/prompts.jsonl").exists()
