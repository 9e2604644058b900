"""Evaluation: the files, resume, stored responses, endpoints; against a real vLLM server and the real grader."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.asking import run_evaluate
from megatron_t1.cli.options import parse, read
from megatron_t1.config import Config
from megatron_t1.data.prompts import Question
from megatron_t1.data.sets import load_set
from megatron_t1.data.template import Template
from megatron_t1.evaluation.config import EvaluateConfig, ScalingConfig, SetSampling
from megatron_t1.evaluation.evaluate import evaluate
from megatron_t1.evaluation.figures import EvalResult, summarize
from megatron_t1.evaluation.questions import question_sets
from megatron_t1.evaluation.results import compare, read_summaries, table
from megatron_t1.evaluation.resume import check_settings
from megatron_t1.evaluation.samplers import (
    Ask,
    EndpointSampler,
    OnDone,
    Response,
    Sampler,
    ServerSampler,
    StoredSampler,
)
from megatron_t1.fields import FieldError
from megatron_t1.files import write_json, write_jsonl
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.chat_endpoint import NoAnswerError
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import EndpointConfig, SamplingConfig
from megatron_t1.servers.servers import Servers
from tests import hostile
from tests.forks import ROOT
from tests.scripted import ScriptedEndpoint, serving
from tests.tiny import make_tiny_tokenizer

CFG = EvaluateConfig(sampling=SamplingConfig(temperature=1.2, num_samples=3, max_new_tokens=16))
QUESTIONS = [Question(id=f"q{i}", messages=[{"role": "user", "content": f"{i}+7?"}], gold="7") for i in range(5)]
WEIGHTS = {"weights": "abc"}


class Counting:
    """A real sampler; it remembers what was asked, and Ctrl-C comes once `max_samples` came back."""

    def __init__(self, sampler: Sampler, max_samples: int = 99) -> None:
        self.sampler, self.max_samples = sampler, max_samples
        self.asked: list[tuple[str, int]] = []
        self.identity = sampler.identity

    def sample(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int, on_done: OnDone) -> None:
        for ask in asks:
            self.asked += [(ask.question.id, ask.first + j) for j in range(ask.count)]
        seen = 0

        def limited(question: Question, first: int, responses: list[Response]) -> None:
            nonlocal seen
            if seen >= self.max_samples:
                os.kill(os.getpid(), signal.SIGINT)  # this is the client's thread: the main one gets it
                return
            on_done(question, first, responses)
            seen += len(responses)

        self.sampler.sample(asks, sampling, seed, limited)


@pytest.fixture(scope="module")
def real(server: Servers, tiny_dir: Path) -> Iterator[ServerSampler]:
    template = Template(tiny_dir)
    with Scorer(RewardConfig()) as scorer, RolloutClient(server, template.tokenizer, vocab_size=320) as client:
        yield ServerSampler(Rank0(server, client, scorer), template)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(RewardConfig()) as scorer:
        yield scorer


def run(sampler: Sampler, out_dir: Path, label: str, seed: int = 1, **options: Any) -> EvalResult:
    return evaluate(sampler, QUESTIONS, out_dir / label / "set", CFG.sampling, WEIGHTS, seed, **options)


def files(folder: Path) -> dict[str, str]:
    """Contents by name; the label is another by purpose."""
    return {path.name: path.read_text().replace(f'"{folder.parent.name}"', '""') for path in folder.iterdir()}


def test_a_cut_evaluation_resumes_to_the_files_of_an_uncut_one(real: ServerSampler, tmp_path: Path) -> None:
    run(real, tmp_path, "whole")
    with pytest.raises(KeyboardInterrupt, match=r"of 15 responses are kept in .* --resume"):
        run(Counting(real, max_samples=7), tmp_path, "cut")
    part = tmp_path / "cut/set/responses.part.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:-1]) + lines[-1][:40])  # and killed while writing a line
    kept = {(row["id"], row["sample"]) for row in map(json.loads, lines[:-1])}
    again = Counting(real)
    run(again, tmp_path, "cut", resume=True)
    assert kept
    assert sorted(again.asked) == sorted({(f"q{i}", j) for i in range(5) for j in range(3)} - kept)
    assert files(tmp_path / "cut/set") == files(tmp_path / "whole/set")
    rows = [json.loads(line) for line in (tmp_path / "whole/set/responses.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(f"q{i}", j) for i in range(5) for j in range(3)]


def test_a_cut_evaluation_does_not_go_on_with_another_chat_template(real: ServerSampler, tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "other")
    path = tmp_path / "other/chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    other = ServerSampler(real._rank0, Template(path.parent))
    with pytest.raises(KeyboardInterrupt):
        run(Counting(real, max_samples=7), tmp_path, "cut")
    with pytest.raises(ValueError, match="holds results with other prompts: give another --label"):
        run(other, tmp_path, "cut", resume=True)
    settings = tmp_path / "cut/set/settings.json"
    of_older = {name: value for name, value in json.loads(settings.read_text()).items() if name != "prompts"}
    settings.write_text(json.dumps(of_older))
    with pytest.raises(ValueError, match="holds results with other prompts: give another --label"):
        run(real, tmp_path, "cut", resume=True)


def test_samples_do_not_depend_on_what_else_is_asked(real: ServerSampler, tmp_path: Path) -> None:
    run(real, tmp_path, "all")
    evaluate(real, QUESTIONS[3:4], tmp_path / "one" / "set", CFG.sampling_of("set"), WEIGHTS, 1)
    lines = (tmp_path / "all/set/responses.jsonl").read_text().splitlines()
    assert (tmp_path / "one/set/responses.jsonl").read_text().splitlines() == lines[9:12]


def test_results_of_another_experiment_are_not_taken_for_these(real: ServerSampler, tmp_path: Path) -> None:
    run(real, tmp_path, "a")
    with pytest.raises(ValueError, match="--resume completes"):
        run(real, tmp_path, "a")
    with pytest.raises(ValueError, match="other seed: give another --label"):
        run(real, tmp_path, "a", seed=2, resume=True)
    folder = tmp_path / "a" / "set"
    with pytest.raises(ValueError, match="other prompts, questions, weights"):
        evaluate(real, QUESTIONS[:2], folder, CFG.sampling, {"weights": "other"}, 1, resume=True)
    other = Counting(real)
    run(other, tmp_path, "a", seed=2, resume=True, replace_other=True)
    nothing = Counting(real)
    run(nothing, tmp_path, "a", seed=2, resume=True)
    assert (len(other.asked), len(nothing.asked)) == (15, 0)


def row(identity: str, correct: bool, extracted: str | None = "3", finish: str = "stop", **more: Any) -> dict[str, Any]:
    outcome = "correct" if correct else "wrong" if extracted else "no_answer"
    reward = {"correct": correct, "outcome": outcome, "extracted": extracted, "penalties": {}}
    return {"id": identity, "reward": reward, "num_tokens": 10, "finish_reason": finish, **more}


def test_summary_counts_what_the_grader_said() -> None:
    rows = [row("a", True, level=1), row("a", True), row("b", True, level=2), row("b", False, "4", "length")]
    rows += [row("c", False, level=2), row("c", False, None)]
    result = summarize("x", "set", rows, {})
    assert (result.num_questions, result.num_samples, result.pass_at_1) == (3, 2, 0.5)
    assert result.outcomes == {"correct": 3, "no_answer": 1, "wrong": 2}
    assert (result.mean_tokens, result.share_cut) == (10, pytest.approx(1 / 6))
    assert result.interval[0] < 0.5 < result.interval[1]
    assert result.pass_at_k["2"].value == pytest.approx(2 / 3)
    assert result.majority_at_k["2"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert {group: found["pass_at_1"] for group, found in result.by["level"].items()} == {"1": 1.0, "2": 0.25}
    assert result.by["subject"] == {}


@pytest.mark.parametrize(
    "wrong",
    [(r"\frac{1}{2}", r"\dfrac12", "0.5", ".50"), ("(1,2)", "(1, 2)", r"\left(1,2\right)", "$(1,2)$")],
)
def test_a_wrong_answer_in_several_spellings_wins_the_majority_it_has(wrong: tuple[str, ...]) -> None:
    """Three right answers against four spellings of one wrong answer: drawn all, the wrong one wins."""
    rows = [row("q", True) for _ in range(3)] + [row("q", False, answer) for answer in wrong] + [row("q", False, None)]
    assert summarize("x", "set", rows, {}).majority_at_k["8"].value == pytest.approx(0)
    apart = [*rows[:3], *(row("q", False, answer) for answer in ("x+1", "x-1", "1", "-1")), rows[-1]]
    assert summarize("x", "set", apart, {}).majority_at_k["8"].value == pytest.approx(1)


def test_known_responses_to_math500_give_the_known_score(scorer: Scorer, tmp_path: Path) -> None:
    """462 right answers of 500 are T1-32B's 92.4; a second file with 10 more right ones is better, and it shows."""
    questions = load_set("math500", sets_dir=ROOT / "tests/data/grader")
    assert len(questions) == 500
    for label, num_right in (("paper", 462), ("better", 472)):
        lines = []
        for i, question in enumerate(questions):
            answer = question.gold if i < num_right else "\\text{I do not know}"
            response = f"<think>\\boxed{{1}}?</think>The answer is $\\boxed{{{answer}}}$."
            lines.append(json.dumps({"id": question.id, "response": response, "num_tokens": 8}))
        (tmp_path / f"{label}.jsonl").write_text("\n".join(lines) + "\n")
        stored = StoredSampler(tmp_path / f"{label}.jsonl", scorer)
        cfg = replace(CFG, sampling=SamplingConfig(num_samples=stored.num_samples(questions)))
        folder = tmp_path / "evaluate" / label / "math500"
        result = evaluate(stored, questions, folder, cfg.sampling_of("math500"), {"file": label}, 0)
        assert result.pass_at_1 == num_right / 500
        assert result.num_samples == 1
        assert sum(group["num_questions"] for group in result.by["level"].values()) == 500
        assert len(result.by["subject"]) == 7
    summaries = read_summaries(tmp_path)
    assert table(summaries).splitlines()[2:] == ["| better | 94.4 ± 2.0 |", "| paper | 92.4 ± 2.3 |"]
    other = [summaries[0], {**summaries[1], "num_samples": 4}]
    assert [table(rows).splitlines()[0][2:] for rows in (summaries, other)] == [
        "model | MATH500 |",
        "model | MATH500 (average of 1 to 4) |",
    ]
    (difference,) = compare(tmp_path / "evaluate/paper", tmp_path / "evaluate/better")
    assert difference["result"].difference == pytest.approx(0.02)
    assert difference["result"].p_value == pytest.approx(2 / 2**10)  # ten questions changed, all to the better
    with pytest.raises(ValueError, match="0 responses to question 'q0' and 1 to"):
        StoredSampler(tmp_path / "paper.jsonl", scorer).num_samples([*questions, QUESTIONS[0]][::-1])


def test_an_endpoint_that_goes_away_leaves_what_it_answered(scorer: Scorer, tmp_path: Path) -> None:
    """One question is never answered: one plain error; the resumed run asks for what is missing, and no more."""
    answered: list[str] = []
    cfg = replace(CFG, sampling=replace(CFG.sampling, num_samples=1))

    def answer(body: dict[str, Any]) -> str:
        answered.append(body["messages"][-1]["content"])
        return "" if answered[-1] == "4+7?" and len(answered) < 6 else "\\boxed{7}"

    with serving(ScriptedEndpoint(answer)) as server:
        sampler = EndpointSampler(EndpointConfig(urls=(server.url,), max_retries=0, max_in_flight=1), scorer)
        with pytest.raises(NoAnswerError, match="no answer after 1 attempts"):
            evaluate(sampler, QUESTIONS, tmp_path / "x" / "set", cfg.sampling_of("set"), WEIGHTS, 1)
        result = evaluate(sampler, QUESTIONS, tmp_path / "x" / "set", cfg.sampling_of("set"), WEIGHTS, 1, resume=True)
    assert result.pass_at_1 == 1.0
    assert answered == [*(f"{i}+7?" for i in range(5)), "4+7?"]


def test_a_chat_endpoint_answers_as_the_server_does(
    server: Servers, real: ServerSampler, scorer: Scorer, tmp_path: Path
) -> None:
    """Greedy, through /v1/chat/completions with the server's own chat template: the same texts and lengths."""
    greedy = replace(CFG, sampling=SamplingConfig(temperature=0, num_samples=1, max_new_tokens=12))
    key_file = tmp_path / "key"
    key_file.write_text(server.all[0].key)
    key_file.chmod(0o600)
    endpoint = EndpointSampler(EndpointConfig(urls=(server.all[0].url,), key_file=str(key_file)), scorer)
    evaluate(real, QUESTIONS, tmp_path / "ours" / "set", greedy.sampling_of("set"), {}, 0)
    evaluate(endpoint, QUESTIONS, tmp_path / "chat" / "set", greedy.sampling_of("set"), {}, 0)

    def said(label: str) -> list[tuple]:
        """A random model writes broken UTF-8, of which the server leaves out what may still become a character."""
        rows = map(json.loads, (tmp_path / label / "set/responses.jsonl").read_text().splitlines())
        return [(r["id"], r["response"].replace("\ufffd", ""), r["num_tokens"], r["finish_reason"]) for r in rows]

    assert said("chat") == said("ours")


def refuse(*texts: str) -> Callable[[dict[str, Any]], str]:
    return lambda body: "REFUSE" if any(text in str(body) for text in texts) else "so \\boxed{7}"


def test_a_refusal_is_its_questions_outcome_and_counted(scorer: Scorer, tmp_path: Path) -> None:
    greedy = CFG.sampling_of("set")
    with serving(ScriptedEndpoint(refuse("3+7"))) as server:
        sampler = EndpointSampler(EndpointConfig(urls=(server.url,), max_retries=0), scorer)
        result = evaluate(sampler, QUESTIONS, tmp_path / "chat" / "set", greedy, {}, 0)
    assert result.outcomes == {"correct": 12, "refused": 3}
    assert result.pass_at_1 == pytest.approx(0.8)


def test_an_evaluation_in_which_all_is_refused_is_an_error_and_no_result(scorer: Scorer, tmp_path: Path) -> None:
    greedy, folder = CFG.sampling_of("set"), tmp_path / "chat" / "set"
    with serving(ScriptedEndpoint(refuse("7"))) as server:
        sampler = EndpointSampler(EndpointConfig(urls=(server.url,), max_retries=0), scorer)
        with pytest.raises(ValueError, match=r"all 15 requests were refused, the first one: refused: 400.*too long"):
            evaluate(sampler, QUESTIONS, folder, greedy, {}, 0)
    assert not (folder / "summary.json").exists()
    with serving(ScriptedEndpoint(refuse("nothing"))) as server:
        sampler = EndpointSampler(EndpointConfig(urls=(server.url,), max_retries=0), scorer)
        assert evaluate(sampler, QUESTIONS, folder, greedy, {}, 0, resume=True).pass_at_1 == 1


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"num_tokens": None}, (0, "stop")),
        ({"num_tokens": float("nan"), "finish_reason": None}, (0, "stop")),
        ({"num_tokens": 7.0, "finish_reason": "length"}, (7, "length")),
        ({}, (0, "stop")),
    ],
)
def test_stored_responses_without_counts_are_read(scorer: Scorer, tmp_path: Path, fields: dict, kept: tuple) -> None:
    path = tmp_path / "stored.jsonl"
    path.write_text("".join(json.dumps({"id": q.id, "response": "\\boxed{7}", **fields}) + "\n" for q in QUESTIONS))
    sampling = SamplingConfig(num_samples=1, temperature=0)
    evaluate(StoredSampler(path, scorer), QUESTIONS, tmp_path / "stored" / "set", sampling, {}, 0)
    rows = map(json.loads, (tmp_path / "stored" / "set" / "responses.jsonl").read_text().splitlines())
    assert {(row["num_tokens"], row["finish_reason"]) for row in rows} == {kept}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": "many"}, "\"num_tokens\" is 'many'"),
        ({"num_tokens": -1}, '"num_tokens" is -1'),
        ({"num_tokens": 1.5}, '"num_tokens" is 1.5'),
        ({"num_tokens": float("inf")}, '"num_tokens" is inf'),
        ({"num_tokens": True}, '"num_tokens" is True'),
        ({"finish_reason": "eos"}, "\"finish_reason\" is 'eos'"),
    ],
)
def test_stored_responses_with_odd_fields_are_named_by_line(
    scorer: Scorer, tmp_path: Path, fields: dict, message: str
) -> None:
    path = tmp_path / "stored.jsonl"
    path.write_text(json.dumps({"id": "q0", "response": "x", **fields}))
    with pytest.raises(ValueError, match=f"stored.jsonl:1: {message}"):
        StoredSampler(path, scorer)


def test_a_number_of_samples_for_one_set_leaves_that_of_another() -> None:
    """AIME is averaged over 32 samples unless it is named itself."""
    assert EvaluateConfig(num_samples={"gpqa": 8}).sampling_of("aime2024").num_samples == 32
    assert EvaluateConfig(num_samples={"gpqa": 8}).sampling_of("gpqa").num_samples == 8
    assert EvaluateConfig(num_samples={"gpqa": 8}).sampling_of("math500").num_samples == 1
    assert EvaluateConfig(num_samples={"aime2024": 4}).sampling_of("aime2024").num_samples == 4
    assert ScalingConfig(set="sets/aime2024.jsonl", num_samples={"math500": 2}).sampling_of_set().num_samples == 32


def test_greedy_and_sampled_sets_are_one_command() -> None:
    greedy = SamplingConfig(temperature=0, num_samples=1)
    with pytest.raises(FieldError, match=r"sampling_by_set = \{\} leaves aime2024 with num_samples = 32 must be 1"):
        EvaluateConfig(sampling=greedy, sets=("math500", "aime2024"))
    own = {"aime2024": SetSampling(temperature=0.6, top_p=0.95)}
    cfg = EvaluateConfig(sampling=greedy, sets=("math500", "aime2024"), sampling_by_set=own)
    assert cfg.sampling_of("math500") == greedy
    assert cfg.sampling_of("aime2024") == replace(greedy, temperature=0.6, top_p=0.95, num_samples=32)
    with pytest.raises(
        FieldError, match=r"num_samples = \{'aime2024': 32, 'aime2025': 32\} leaves aime2024 with num_samples = 32 must"
    ):
        ScalingConfig(sampling=greedy, set="aime2024")
    assert ScalingConfig(sampling=greedy, set="math500").sampling_of_set() == greedy


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (
            "{math500: {temperature: high}}",
            "evaluate.sampling_by_set.math500.temperature = 'high' must be a number or null",
        ),
        ("{math500: {top_p: [1]}}", "evaluate.sampling_by_set.math500.top_p = [1] must be a number or null"),
        ("{math500: {stop: foo}}", "evaluate.sampling_by_set.math500.stop = 'foo' must be a list: [foo] or null"),
        (
            "{math500: {max_new_tokens: 1.5}}",
            "evaluate.sampling_by_set.math500.max_new_tokens = 1.5 must be a whole number",
        ),
        ("{math500: {heat: 1}}", "evaluate.sampling_by_set.math500.heat is not a setting"),
        ("{math500: hot}", "evaluate.sampling_by_set.math500 = 'hot' must be a section"),
        ("{math500: {min_p: 1}}", "leaves math500 with min_p = 1.0 must lie in [0, 1)"),
        (
            "{aime24: {top_p: 0.9}}",
            "evaluate.sampling_by_set = ['aime24'] must be of evaluate.sets or data.heldout: own, q",
        ),
    ],
)
def test_a_sets_own_sampling_is_read_as_other_settings_are(own: str, told: str) -> None:
    fixed = ["--evaluate.sets", "[math500]"] if "aime24" not in own else ["--evaluate.sets", "[x/own.jsonl]"]
    _, problems = parse(Config, [*fixed, "--data.heldout", "d/q.jsonl", "--evaluate.sampling_by_set", own])
    assert len(problems) == 1
    assert told in problems[0]


def test_own_samplings_are_of_sets_that_are_measured() -> None:
    own = ["--evaluate.sampling_by_set", "{aime2024: {temperature: '0.7', stop: [a]}}"]
    read_back = read(Config, [*own, "--evaluate.sets", "[math500, aime2024]"]).evaluate.sampling_of("aime2024")
    assert (read_back.temperature, read_back.stop, read_back.num_samples) == (0.7, ("a",), 32)
    assert read(Config, [*own, "--data.heldout", "d/aime2024.jsonl"])
    assert read(Config, own), "nothing is measured: `t1 serve`, say"
    _, problems = parse(Config, ["--data.heldout", "d/aime2024.jsonl", "--evaluate.sampling.temperature", "0"])
    assert len(problems) == 1
    assert "evaluate.sampling_by_set = {} leaves aime2024 with num_samples = 32 must be 1" in problems[0]
    _, problems = parse(Config, ["--evaluate.num_samples", "{aime24: 8}", "--evaluate.sets", "[aime2024]"])
    assert problems == ["evaluate.num_samples = ['aime24'] must be of evaluate.sets or data.heldout: aime2024"]


@pytest.mark.parametrize(
    ("gold", "mode", "choices", "is_said"),
    [
        (r"\frac{1}{2", "response", [], True),
        ("1}+{2", "response", [], True),
        (r"\boxed{", "response", [], True),
        ("9" * 5000, "response", [], True),
        ("0", "mc", ["no", "yes"], True),
        ("C", "mc", ["no", "yes"], True),
        (r"\frac{1}{2}", "response", [], False),
        (r"so \boxed{\{1, 2\}}.", "response", [], False),
        ("B", "mc", ["no", "yes"], False),
        ("D", "mc", [], False),
        ("{", "answer", [], False),
    ],
)
def test_a_question_that_nobody_can_answer_right_is_said_before_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gold: str, mode: str, choices: list[str], is_said: bool
) -> None:
    odd = {"id": "odd", "prompt": "?", "answer": gold, "mode": mode, "choices": choices}
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (odd, {"id": "good", "prompt": "?", "answer": "1"})))
    question_sets(Config(), [str(path)])
    said = f"warning: set mine: no response to 1 of its 2 questions can be right.*: odd \\({re.escape(gold[:40])}\\);"
    assert bool(re.search(said, capsys.readouterr().err)) == is_said


def test_golds_that_can_be_right_are_passed_over_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(question_sets(Config(), [str(ROOT / "tests/data/grader/math500.jsonl")])["math500"]) == 500
    assert capsys.readouterr().err == ""


def test_several_sets_are_done_with_the_last_of_them(tmp_path: Path) -> None:
    """What says so is not there before, as a chain of jobs would take the first set's result for all of it."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "prompt": f"{name}?", "answer": "7"}) + "\n")
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        asked.append(body["messages"][-1]["content"])
        return "" if "two?" in asked[-1] and len(asked) < 3 else "\\boxed{7}"

    with serving(ScriptedEndpoint(answer)) as server:
        endpoint = EndpointConfig(urls=(server.url,), max_retries=0)
        evaluation = replace(CFG, sets=tuple(str(tmp_path / f"{n}.jsonl") for n in ("one", "two")), endpoint=endpoint)
        cfg = Config(
            run_dir=str(tmp_path), resume=True, evaluate=replace(evaluation, sampling=SamplingConfig(num_samples=1))
        )
        with pytest.raises(NoAnswerError):
            run_evaluate(cfg, "rl")
        assert (tmp_path / "evaluate/rl/one/summary.json").exists()
        assert not (tmp_path / "evaluate/rl/sets.json").exists()
        run_evaluate(cfg, "rl")
    assert json.loads((tmp_path / "evaluate/rl/sets.json").read_text()) == ["one", "two"]
    assert len(asked) == 3, "the first set is not asked again"


def test_questions_with_the_ids_of_others_are_not_paired_with_them(tmp_path: Path) -> None:
    for name, gold in (("algebra", "1"), ("geometry", "2")):
        rows = [{"id": str(i), "gold": gold, "reward": {"correct": name == "algebra"}} for i in range(12)]
        write_jsonl(tmp_path / name / "set" / "responses.jsonl", rows)
    with pytest.raises(ValueError, match="no set with the same questions"):
        compare(tmp_path / "algebra", tmp_path / "geometry")


def test_a_table_with_dates_is_evaluated(scorer: Scorer, tmp_path: Path) -> None:
    """As Parquet has them, beside what is read; `level` too."""
    meta = {"written": datetime.date(2025, 1, 2), "level": datetime.date(2025, 1, 3)}
    question = replace(QUESTIONS[0], meta=meta)
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": question.id, "response": "\\boxed{7}"}) + "\n")
    sampling = SamplingConfig(num_samples=1)
    stored = StoredSampler(tmp_path / "r.jsonl", scorer)
    result = evaluate(stored, [question], tmp_path / "evaluate/label/set", sampling, {}, 0)
    assert result.pass_at_1 == 1.0
    assert list(result.by["level"]) == ["2025-01-03"]


def test_half_a_letter_in_a_refusal_costs_that_question_alone(scorer: Scorer, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked = request["messages"][-1]["content"]
        said = {"content": None, "refusal": "no \ud83d"} if asked == "0+7?" else {"content": "\\boxed{7}"}
        return {"choices": [{"message": said, "finish_reason": "stop"}]}

    with hostile.serving(answer) as url:
        sampler = EndpointSampler(EndpointConfig(urls=(url,), max_retries=0), scorer)
        result = evaluate(sampler, QUESTIONS, tmp_path / "a" / "set", SamplingConfig(num_samples=1), {}, 0)
    assert result.outcomes == {"refused": 1, "correct": 4}
    row = json.loads((tmp_path / "a/set/responses.jsonl").read_text().splitlines()[0])
    assert row["reward"]["reason"].endswith(": no ?")


def test_what_an_endpoint_is_not_asked_is_refused() -> None:
    fields = {"endpoint": EndpointConfig(urls=("http://host/v1",)), "sampling": SamplingConfig(stop_token_ids=(7,))}
    with pytest.raises(FieldError, match=r"stop_token_ids = .*give sampling.stop"):
        EvaluateConfig(**fields)


def test_results_from_before_a_setting_was_there_are_gone_on_with(tmp_path: Path) -> None:
    of_today = SamplingConfig(temperature=0.6, top_p=0.95, num_samples=1)
    before = {name: value for name, value in asdict(of_today).items() if name != "top_k"}
    write_json(tmp_path / "settings.json", {"sampling": before})
    assert check_settings(tmp_path / "settings.json", {"sampling": of_today.identity()}, resume=True, elsewhere="")
    cut = replace(of_today, top_k=20).identity()
    with pytest.raises(ValueError, match="sampling"):
        check_settings(tmp_path / "settings.json", {"sampling": cut}, resume=True, elsewhere="another --label")
