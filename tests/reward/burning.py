"""The graders of tests: the product's, and golds on which they use up their time or come to grief."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from megatron_t1.reward import grading
from megatron_t1.reward.grading import prepare, warm_up

__all__ = ["grade_task", "prepare", "warm_up"]
BURNS, BURNS_AT_ONCE, DIES, SLEEPS = "burns", "burns at once", "dies", "sleeps"
"""Golds: endless after the penalties and before anything is said, the end of the process, no CPU time used."""


def grade_task(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As `grading.grade_task`, but for these golds."""
    gold = task.get("gold")
    if gold == DIES:
        os.abort()
    if gold == SLEEPS:
        time.sleep(1000)
    while gold == BURNS_AT_ONCE:
        pass
    for message in grading.grade_task(task):
        if gold == BURNS:
            yield {**message, "verdict": None, "done": False}
        while gold == BURNS:
            pass
        yield message
