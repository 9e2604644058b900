"""Verdicts on the shipped collections: other projects' cases, the hostile set, MATH500."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_t1.reward.answers.verify import verify
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from tests.reward.cases import pair, rows


@pytest.fixture(scope="module")
def scorer():
    with Scorer(RewardConfig(num_workers=2)) as scorer:
        yield scorer


def _grade(scorer: Scorer, cases: list[dict]) -> list[bool]:
    pairs = [pair(c["gold"], c["prediction"], c["mode"], choices=c.get("choices") or ()) for c in cases]
    rewards = scorer.score_all(pairs)
    assert not [r for r in rewards if r.outcome == "crash"]
    return [r.correct for r in rewards]


def test_cases(scorer: Scorer) -> None:
    cases = rows("cases")
    correct = dict(zip((c["id"] for c in cases), _grade(scorer, cases), strict=True))
    assert [c["id"] for c in cases if correct[c["id"]] and not c["expected"]] == []  # no wrong answer is accepted
    share = {}
    for hard in (True, False):
        mine = [c for c in cases if bool(c.get("hard")) == hard]
        share[hard] = sum(correct[c["id"]] == c["expected"] for c in mine) / len(mine)
    assert share[False] >= 0.99
    assert share[True] >= 0.88


def test_hostile_inputs(scorer: Scorer) -> None:
    cases = rows("adversarial")
    correct = _grade(scorer, cases)
    wrong = [c["id"] for c, ok in zip(cases, correct, strict=True) if c["expected"] != "any" and ok != c["expected"]]
    assert wrong == []
    assert not list(Path("/tmp").glob("pwned*"))


def test_math500_answers_equal_themselves(scorer: Scorer) -> None:
    golds = [row["answer"] for row in rows("math500")]
    spelled = [r"Thus $$\boxed{" + g.replace("\\frac", "\\dfrac").replace(" ", "  ") + "}.$$" for g in golds]
    rewards = scorer.score_all([pair(g, text) for g, text in zip(golds, spelled, strict=True)])
    assert [(g, r.reason) for g, r in zip(golds, rewards, strict=True) if not r.correct] == []


def _letters(answer: str) -> str:
    return answer.replace("dfrac", "frac").replace(" ", "")


def _kind(answer: str) -> str:
    patterns = {
        "text": r"\\text", "matrix": "begin", "degrees": "circ", "set": r"cup|\\infty|\\in|\[", "tuple": r"^\(|left\(",
        "list": ",", "equation": "=", "root": "sqrt", "pi": "pi", "fraction": "frac|/", "letters": "[a-z]",
    }  # fmt: skip
    return next((kind for kind, pattern in patterns.items() if re.search(pattern, answer)), "number")


def test_math500_answers_do_not_equal_others_of_their_kind(scorer: Scorer) -> None:
    by_kind = defaultdict(set)
    for row in rows("math500"):
        by_kind[_kind(row["answer"])].add(row["answer"])
    generator = random.Random(0)
    pairs = [(g, o) for golds in by_kind.values() for g in sorted(golds)
             for o in generator.sample(sorted(golds - {g}), min(5, len(golds) - 1))]  # fmt: skip
    rewards = scorer.score_all([pair(g, r"\boxed{" + o + "}") for g, o in pairs])
    accepted = {(g, o) for (g, o), r in zip(pairs, rewards, strict=True) if r.correct}
    same = {frozenset(p) for p in (("-2,1", "1,-2"),)}  # the same numbers in another order: lists have no order
    spelled_alike = {(g, o) for g, o in accepted if _letters(g) == _letters(o)}
    assert {frozenset(p) for p in accepted - spelled_alike} <= same


def test_nothing_is_imported_after_the_warm_up() -> None:
    """A locked-down grader cannot open files, so a late import would change verdicts."""
    code = (
        "import json, sys\n"
        "from megatron_t1.reward import grading\n"
        "from megatron_t1.reward.config import PenaltyConfig, RewardConfig\n"
        "from megatron_t1.reward.processes import worker\n"
        "assert not {'asyncio', 'heapq', 'torch'} & set(sys.modules)  # nothing that hides a late import\n"
        "grading.warm_up(); before = set(sys.modules)\n"
        "names = ['repetition', 'overlong', 'garbled', 'language', 'perplexity', 'malformed']\n"
        "penalties = PenaltyConfig(enabled=tuple(names), max_ngram_repeats=3)\n"
        "config = json.dumps(RewardConfig(penalties=penalties).deciding())\n"
        "task = {'choices': (), 'prompt': None, 'token_ids': [1] * 40, 'finish_reason': 'stop', 'gold': '0'}\n"
        "task |= {'num_hidden_tokens': 9, 'nll': (9.0, 9.0)}\n"
        "task |= {'question': 'What is $1+1$?', 'config': config}\n"
        "for number, line in enumerate(sys.stdin):\n"
        "    task |= {'explain': number % 5 == 0} | json.loads(line)\n"
        "    list(grading.grade_task(task)); list(grading.grade_task({'gold_to_check': task['gold']}))\n"
        "late = set(sys.modules) - before\n"
        "assert not late, late\n"
    )
    tasks = [
        {
            "text": row.get("prediction", row.get("text")),
            "gold": str(row.get("gold", 0)),
            "mode": row.get("mode", "text"),
        }
        for name in ("cases", "adversarial", "textquality")
        for row in rows(name)
    ]
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    subprocess.run([sys.executable, "-c", code], input=lines, text=True, check=True, cwd=Path(__file__).parents[2])


def test_a_product_of_many_matrices_is_not_written_out() -> None:
    """Each factor doubles what the cells are: 30 of them took gigabytes."""
    matrices = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
    used_s = time.process_time()
    assert verify("5", rf"\boxed{{{matrices * 60}}}").outcome == "wrong"
    assert time.process_time() - used_s < 0.3
    assert verify(r"\begin{pmatrix}37&54\\81&118\end{pmatrix}", rf"\boxed{{{matrices * 3}}}").outcome == "correct"


def test_an_endless_number_costs_no_more_than_other_text() -> None:
    """16,000 digits after "The answer is" once took seconds: a wrong timeout is a wrong reward."""
    used_s = time.process_time()
    assert verify("0", "The answer is 0." + "9" * 16_000).outcome == "wrong"
    assert time.process_time() - used_s < 0.3


def test_no_search_for_what_repeats_in_long_numbers() -> None:
    used_s = time.process_time()
    threes = "0." + "3" * 990
    for text in (f"x={threes}3x={threes}-", rf"x={threes[:-9]}\ldots", "0." + "37" * 480 + r"1\ldots"):
        assert verify("0", rf"\boxed{{{text}}}").outcome == "wrong"
    assert time.process_time() - used_s < 0.3
    assert verify("0", r"\boxed{" + r"sixths \text{m}/" * 220 + "}").outcome == "wrong"  # nor for where words end
    assert time.process_time() - used_s < 0.5
    assert verify(r"\frac{14}{99}", r"\boxed{0.1414\ldots}").outcome == "correct"


def test_what_only_a_slow_parser_read() -> None:
    """Kinds that needed the parser that could run away."""
    right = [
        (r"x\equiv 3\pmod 5", r"x \equiv 3 \pmod{5}"), (r"x\equiv 3\pmod 5", r"x\equiv 8 \ (\text{mod } 5)"),
        ("2", r"17 \bmod 5"), (r"\{1\}\cup\{2,3\}", r"\{1,2,3\}"), (r"(0,1]\cup\{5\}", r"\{5\}\cup(0,1]"),
        (r"\frac{\hbar\omega}{2}", r"\frac12\omega\hbar"), (r"{n \choose 2}", r"\frac{n(n-1)}{2}"),
        ("x_1^2", "x^{2}_{1}"), ("y_1''", "y''_{1}"), (r"\frac12", r"{1 \over 2}"),
    ]  # fmt: skip
    wrong = [(r"x\equiv 3\pmod 5", r"x\equiv 4\pmod 5"), (r"x\equiv 3\pmod 5", r"x\equiv 3\pmod 7"),
             ("3", r"17 \bmod 5 = 3"), (r"\{1\}\cup\{2\}", r"\{1\}"), ("x_1^2", "x_2^2")]  # fmt: skip
    assert [pair for pair in right if verify(*pair, "answer").outcome != "correct"] == []
    assert [pair for pair in wrong if verify(*pair, "answer").outcome == "correct"] == []


def test_a_long_response_is_read_at_its_end() -> None:
    thinking = "We try $x = 1$ and \\boxed{9}. " * 20_000
    assert verify("7", thinking + "</think> So \\boxed{7}.").outcome == "correct"
    assert verify("7", "<think>" + thinking + "\\boxed{7}").outcome == "no_answer"
