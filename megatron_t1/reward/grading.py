"""What a grader process does with one task: penalties, the cheap verdict, then the full one; and its warm-up."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import msgspec

from megatron_t1.reward.answers.golds import gold_problem
from megatron_t1.reward.answers.policy import EqualityConfig
from megatron_t1.reward.answers.verify import explained, verify_cheaply, verify_fully
from megatron_t1.reward.config import DECIDING, VERIFIERS, PenaltyConfig, RewardConfig
from megatron_t1.reward.penalties import Response, find_penalties
from megatron_t1.reward.processes.programs import start_runner as prepare
from megatron_t1.types import Verdict

__all__ = ["grade_task", "prepare", "warm_up"]

_SEEN = [field.name for field in fields(Response)]


@functools.lru_cache(maxsize=8)
def _config(deciding: str) -> RewardConfig:
    values = {name: value for name, value in json.loads(deciding).items() if name in DECIDING}
    penalties = PenaltyConfig(**{**values["penalties"], "enabled": tuple(values["penalties"]["enabled"])})
    return RewardConfig(**{**values, "penalties": penalties, "equality": EqualityConfig(**values["equality"])})


def grade_task(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Grader side: penalties and the cheap verdict first, so that a timeout loses only the full comparison."""
    if "gold_to_check" in task:
        yield {"problem": gold_problem(task["gold_to_check"]), "done": True}
        return
    cfg, gold, mode, question = _config(task["config"]), task["gold"], task["mode"], task["question"]
    response = Response(**{name: task[name] for name in _SEEN})
    try:
        penalties = find_penalties(cfg.penalties, response)
        if mode in VERIFIERS:
            yield {"penalties": penalties, "answer": None, "done": False}
            found = msgspec.convert(asdict(VERIFIERS[mode](gold, response)), Verdict)
            yield {"verdict": asdict(found), "done": True}
            return
    except Exception as error:  # of a plugin; it would kill one grader after the other and not say why
        failed = Verdict("crash", None, f"{type(error).__name__}: {error}"[:200])
        yield {"penalties": {}, "answer": None, "verdict": asdict(failed), "done": True}
        return

    def told(verdict: Verdict) -> dict[str, Any]:
        return asdict(explained(verdict, gold, mode, question, cfg.equality) if task["explain"] else verdict)

    verdict, answer = verify_cheaply(gold, task["text"], mode, tuple(task["choices"]), cfg.equality.rounding)
    done = verdict is not None or answer is None
    yield {"penalties": penalties, "answer": answer, "verdict": told(verdict) if verdict else None, "done": done}
    if not done:
        assert answer is not None
        yield {
            "verdict": told(verify_fully(gold, answer, mode, question, cfg.refuse_copies, cfg.equality)),
            "done": True,
        }


_LAZY_IMPORTS = ("heapq", "encodings.utf_32_le", "sympy.combinatorics", "sympy.tensor.tensor")
"""What `Counter`, penalties and SymPy import in the middle of their work; a locked-down grader cannot open files any
more."""
_WARM_UP = (
    r"-\frac{3\sqrt{2}}{5}+6i ~ \log_2(8)+\binom{5}{2}\cdot 3!-|y|",
    r"\sum_{k=1}^{10}\frac{k}{2} ~ \sum_{k=0}^{n-1} F_k F_{n-k-1}",
    r"\lim_{x\to 0}\frac{\sin x}{x} ~ \int_0^1 x^{2} dx",
    r"\begin{vmatrix}2&1\\1&2\end{vmatrix} ~ \prod_{k=1}^{10}k",
    r"\sum_{i=1}^{n} a_i b_{n-i+1}+\frac{1}{2^{i}} ~ \sum_{n=1}^{\infty}\frac{1}{n^2}-\frac{(-1)^{k}}{k!}",
    r"\int_{0}^{\pi}\sin^{2}(x)e^{-x}\,dx ~ \lim_{n\to\infty}\left(1+\frac{1}{n}\right)^{n}",
    r"x+y=1 ~ y=1-x",
)


def warm_up() -> None:
    """Grader side, before the first fork: import the parser and fill its tables."""
    for module in _LAZY_IMPORTS:
        importlib.import_module(module)
    for pair in _WARM_UP:
        gold, answer = pair.rsplit(" ~ ", 1)
        verify_fully(gold, answer, "answer")
