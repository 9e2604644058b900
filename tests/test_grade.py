"""`t1 grade`: files in, files out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.cli.main import main
from megatron_t1.config import GradeConfig
from megatron_t1.grade import grade, pair_from_row
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.types import Reward
from tests.reward.cases import rows


def _write(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_verdicts_in_order(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "gold": 4, "prediction": r"\boxed{4}", "mode": "response"},
        {"id": 7, "gold": "x^2-1", "prediction": "(x-1)(x+1)", "mode": "answer"},
        {"id": "c", "gold": "B", "prediction": "The answer is Paris", "mode": "mc", "choices": ["London", "Paris"]},
        {"id": "d", "gold": "3", "prediction": "So we have 3 apples.", "mode": "text"},
        {"id": "e", "gold": "3", "prediction": "nothing\nhere"},
    ]
    out = tmp_path / "out.jsonl"
    grade(GradeConfig(input=_write(tmp_path / "in.jsonl", lines), output=out))
    graded = [json.loads(line) for line in out.open()]
    assert [row["id"] for row in graded] == ["a", 7, "c", "d", "e"]
    assert [row["correct"] for row in graded] == [True, True, True, True, False]
    assert graded[4]["outcome"] == "no_answer"
    assert set(graded[0]) == {"id", "correct", "reward", "outcome", "extracted", "reason", "penalties", "seconds"}


def test_what_was_there_stays_until_all_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _write(tmp_path / "in.jsonl", [{"id": i, "gold": 4, "prediction": "4"} for i in range(3)])
    out = _write(tmp_path / "out.jsonl", ["of an earlier run"])
    before, score = out.read_bytes(), Scorer.score_iter

    def interrupted(*args: Any) -> Iterator[Reward]:
        yield next(score(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_iter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grade(GradeConfig(input=source, output=out))
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    grade(GradeConfig(input=source, output=out))
    assert [json.loads(line)["id"] for line in out.open()] == [0, 1, 2]


def test_a_pipe_or_link_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [{"id": 1, "gold": 4, "prediction": "4"}])
    os.mkfifo(out := tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit(out.read_text)
        grade(GradeConfig(input=source, output=out))
        assert json.loads(read.result())["id"] == 1
    assert out.is_fifo()
    (out := tmp_path / "link").symlink_to(target := tmp_path / "out.jsonl")
    for _ in range(2):
        grade(GradeConfig(input=source, output=out))
        assert json.loads(target.read_text())["id"] == 1
        assert out.is_symlink()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "a", "gold": "4"}, r"prediction \(or response\) missing"),
        ({"gold": "4", "prediction": "4"}, "id missing"),
        ({"id": "a", "gold": "4", "prediction": "4", "mode": "x"}, "mode='x'"),
        ({"id": "a", "gold": ["4"], "prediction": "4"}, '"gold" is'),
        ({"id": "a", "gold": None, "prediction": "4"}, 'no reference answer: "gold"'),
        ({"id": "a", "gold": "4", "prediction": {"text": "4"}}, "prediction="),
        ({"id": "a", "gold": "B", "prediction": "B", "mode": "mc", "choices": "AB"}, "choices="),
        ({"id": "a", "gold": "4", "prediction": "4", "finish_reason": "eos"}, "finish_reason="),
        ([1, 2], "must be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: dict | list, message: str) -> None:
    with pytest.raises(ValueError, match=rf"in\.jsonl:1: {message}"):
        grade(GradeConfig(input=_write(tmp_path / "in.jsonl", [line]), output=tmp_path / "out.jsonl"))


def test_the_names_of_questions_and_evaluations_are_understood(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "answer": 4, "response": "\\boxed{4}"},
        {"id": "b", "gold": "4", "answer": "5", "response": "\\boxed{4}"},
        {"id": "c", "answer": "4", "prediction": None, "response": "\\boxed{4}"},
    ]
    out = tmp_path / "out.jsonl"
    grade(GradeConfig(input=_write(tmp_path / "in.jsonl", lines), output=out))
    assert [json.loads(line)["correct"] for line in out.open()] == [True, True, False]


def test_the_help_says_what_the_files_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grade", "--help"])
    said = capsys.readouterr().out
    for name in (
        "id",
        "gold",
        "answer",
        "prediction",
        "response",
        "mode",
        "choices",
        "question",
        "finish_reason",
        "correct",
    ):
        assert f'"{name}"' in said


def test_text_quality_is_graded_too(tmp_path: Path) -> None:
    """Penalties of the shipped texts, through the command's files."""
    cases = rows("textquality")
    lines = [{"id": c["id"], "gold": "0", "prediction": c["text"], "mode": "response"} for c in cases]
    lines.append({"id": "null", "gold": "0", "prediction": None})
    lines.append({"id": "half", "gold": "0", "prediction": "\\boxed{\ud800}"})
    out = tmp_path / "out.jsonl"
    grade(GradeConfig(input=_write(tmp_path / "in.jsonl", lines), output=out))
    graded = {row["id"]: row for row in map(json.loads, out.open())}
    assert {c["id"]: bool(graded[c["id"]]["penalties"]) for c in cases} == {
        c["id"]: c["expected_penalty"] for c in cases
    }
    assert graded["null"]["outcome"] == "no_answer"
    assert graded["half"]["extracted"] == "?"  # half of a surrogate pair, as every reward has it


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="input ="):
        GradeConfig(input=tmp_path / "nothing.jsonl", output=tmp_path / "out.jsonl")


def test_the_answers_are_not_overwritten(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [])
    with pytest.raises(ValueError, match=r"output = .* must be another file than"):
        GradeConfig(input=source, output=source)


def test_explain_says_what_was_read_and_which_rule_decided(tmp_path: Path) -> None:
    lines = [
        {"id": "unit", "gold": "5 m", "prediction": r"\boxed{500\text{ cm}}"},
        {"id": "order", "gold": "2,2,3", "prediction": r"\boxed{2,3,3}"},
        {"id": "number", "gold": "1 1/2", "prediction": r"\boxed{11/2}"},
        {"id": "unread", "gold": "57", "prediction": r"\boxed{5 7}"},
        {"id": "copied", "gold": "23", "prediction": r"\boxed{3+4\cdot 5}", "question": r"What is $3+4\cdot 5$?"},
    ]
    out = tmp_path / "out.jsonl"
    grade(GradeConfig(input=_write(tmp_path / "in.jsonl", lines), output=out, explain=True))
    reasons = {row["id"]: row["reason"] for row in map(json.loads, out.open())}
    assert "5 with the unit m; answer: a quantity, 500 with the unit 1/100 m; values and units" in reasons["unit"]
    assert "gold: a list of 3: 2; 2; 3" in reasons["order"]
    assert "items in any order: 2, 2, 3 and 2, 3, 3: no" in reasons["order"]
    assert "exact numbers 3/2 and 11/2: not equal" in reasons["number"]
    assert "two numbers without a sign between them" in reasons["unread"]
    assert "a formula of the question" in reasons["copied"]


def test_copies_of_the_question_can_be_allowed(tmp_path: Path) -> None:
    line = {"id": "a", "gold": "23", "prediction": r"\boxed{3+4\cdot 5}", "question": r"What is $3+4\cdot 5$?"}
    source, out = _write(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    for refuse in (True, False):
        grade(GradeConfig(input=source, output=out, reward=RewardConfig(refuse_copies=refuse)))
        assert [json.loads(row)["correct"] for row in out.open()] == [not refuse]


def test_labels_are_compared_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"id": "a", "gold": "4", "prediction": r"\boxed{4}", "mine": True, "kind": "number"},
        {"id": "b", "gold": "4", "prediction": r"\boxed{4}", "mine": False, "kind": "number"},
        {"id": "c", "gold": "x", "prediction": r"\boxed{y}", "mine": True, "kind": "letters"},
    ]
    source = _write(tmp_path / "in.jsonl", lines)
    grade(GradeConfig(input=source, output=tmp_path / "out.jsonl", labels="mine"))
    said = capsys.readouterr().out
    assert "| letters | 1 | 0.0% | 0 | 1 |\n| number | 2 | 50.0% | 1 | 0 |\n| all | 3 | 33.3% | 1 | 1 |" in said
    assert "false positive: b (number)\nfalse negative: c (letters)" in said
    with pytest.raises(ValueError, match="jsonl:1: right=None must be true or false"):
        grade(GradeConfig(input=source, output=tmp_path / "out.jsonl", labels="right"))


def test_null_is_what_is_not_there() -> None:
    nulls = {"mode": None, "choices": None, "finish_reason": None, "question": None}
    prompt, sample = pair_from_row({"id": 1, "gold": "7", "prediction": "7", **nulls})
    assert (prompt.mode, prompt.choices, prompt.text, sample.finish_reason) == ("response", (), "", "stop")
