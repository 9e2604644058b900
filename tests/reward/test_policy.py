"""Where people differ (`reward.equality`): both choices of every option, and what no option changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.cli.main import main
from megatron_t1.reward.answers.policy import EqualityConfig
from megatron_t1.reward.answers.verify import explained, verify

EITHER_WAY: list[tuple[str, Any, Any, str, str]] = [  # option, two values, gold, an answer that only the first takes
    ("units", "optional", "required", r"5\text{ m}", "5"), ("units", "optional", "required", r"\$18", "18"),
    ("units", "optional", "required", r"x=30^\circ, y=2", "x=30, y=2"), ("percent", "either", "asked", "40", r"40\%"),
    ("percent", "either", "exact", r"\{40,60\}", r"\{60\%,40\%\}"), ("percent", "asked", "exact", r"40\%", "40"),
    ("rounding", True, False, "3.14", "3.14159"), ("rounding", True, False, r"\frac{600}{7}", "85.71"),
    ("rounding", True, False, "(1, 2.236)", r"(1, \sqrt{5})"), ("rounding", True, False, r"41.4\%", r"\sqrt{2}-1"),
    ("strict_ends", False, True, "[1,2]", "(1,2)"), ("strict_ends", False, True, r"1\le x<2", "(1,2]"),
    ("strict_ends", False, True, r"x+y\le 1", "x+y<1"),
    ("strict_ends", False, True, r"(-\infty,1]\cup(3,4)", "x<1 or 3<x<4"),
]  # fmt: skip
SAME_EITHER_WAY = [  # gold, answer, whether it is right
    (r"5\text{ m}", r"500\text{ cm}", True), (r"5\text{ m}", r"5\text{ cm}", False), (r"5\text{ apples}", "5", True),
    (r"50\%", "0.5", True), ("0.5", r"50\%", True), ("50", "0.5", False), ("3.14", r"\frac{157}{50}", True),
    ("3.14", "3.1", False), ("(1,2)", "(2,1)", False), ("(1,2)", "[1,3]", False), ("(1,2,3)", "[1,2,3]", False),
    (r"30^\circ", r"\frac{\pi}{6}", True), ("x<1", r"x\ge 1", False), (r"5\text{ m}", r"5\text{ m}", True),
]  # fmt: skip
OPTIONS = {(name, value) for name, *values, _, _ in EITHER_WAY for value in values}


@pytest.mark.parametrize(("name", "taken", "refused", "gold", "answer"), EITHER_WAY)
def test_both_ways(name: str, taken: Any, refused: Any, gold: str, answer: str) -> None:
    """And the explanation names the choice that would turn the verdict."""
    for value, other in ((taken, refused), (refused, taken)):
        equality = EqualityConfig(**{name: value})
        verdict = verify(gold, answer, "answer", equality=equality)
        assert (verdict.outcome == "correct") == (value == taken)
        reason = explained(verdict, gold, "answer", equality=equality).reason
        assert f"reward.equality.{name} = {str(other).lower()} would turn this" in reason


@pytest.mark.parametrize(("name", "value"), sorted(OPTIONS, key=str))
def test_what_no_choice_changes(name: str, value: Any) -> None:
    equality = EqualityConfig(**{name: value})
    found = [verify(gold, answer, "answer", equality=equality).outcome for gold, answer, _ in SAME_EITHER_WAY]
    assert found == ["correct" if right else "wrong" for *_, right in SAME_EITHER_WAY]


def test_a_question_for_percent_hangs_on_the_choice() -> None:
    for value in ("asked", "either", "exact"):
        verdict = verify("40", r"\boxed{40\%}", question="What percent is it?", equality=EqualityConfig(percent=value))
        assert (verdict.outcome == "correct") == (value != "exact")


def test_the_command_takes_the_choices(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    pairs = [(gold, answer) for *_, gold, answer in EITHER_WAY]
    lines = [{"id": i, "gold": g, "prediction": rf"\boxed{{{a}}}"} for i, (g, a) in enumerate(pairs)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"units": "required", "percent": "exact", "rounding": "false", "strict_ends": "true"}
    options = [part for name, value in given.items() for part in (f"--reward.equality.{name}", value)]
    main(["grade", str(source), str(out), *options, "--explain"])
    graded = [json.loads(line) for line in out.open()]
    assert [row["correct"] for row in graded] == [False] * len(pairs)
    assert all("reward.equality." in row["reason"] for row in graded)
