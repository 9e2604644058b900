"""A penalty and three answer modes. Grader processes import this module: nothing here imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from megatron_t1.reward.config import verifier
from megatron_t1.reward.penalties import PenaltyConfig, Response, penalty
from megatron_t1.reward.processes.programs import Programs, Ran
from megatron_t1.types import Verdict

programs = Programs(cpu_s=1.0)


@penalty
def apology(cfg: PenaltyConfig, response: Response) -> str | None:
    """Costs -1 whatever the answer; the reason stands beside the sample."""
    return "it apologizes" if re.search(r"\bI apologi[sz]e\b", response.text) else None


@verifier
def last_integer(gold: str, response: Response) -> Verdict:
    """The last whole number of the response is the answer."""
    numbers = re.findall(r"-?\d+", response.text[-2000:])
    if not numbers:
        return Verdict("no_answer", None, "no whole number")
    return Verdict("correct" if numbers[-1] == gold else "wrong", numbers[-1], f"the last of {len(numbers)} numbers")


@verifier
def unit_tests(gold: str, response: Response) -> Verdict:
    """Code: the last ```python block must define what `gold` calls, and return what it says.

    gold: {"function": "add", "calls": [[1, 2], [0, 0]], "returns": [3, 0]}
    """
    tests = json.loads(gold)
    return _judged(
        response,
        lambda code: programs.run(code, tests["function"], tests["calls"]),  # it never sees what must come out
        tests["returns"],
    )


@verifier
def stdin_tests(gold: str, response: Response) -> Verdict:
    """Code: the last ```python block is a script that reads `inputs` and prints `outputs`, space apart.

    gold: {"inputs": ["1 2\\n", "0 0\\n"], "outputs": ["3\\n", "0\\n"]}
    """
    tests = json.loads(gold)
    return _judged(
        response, lambda code: programs.run_main(code, tests["inputs"]), tests["outputs"], lambda text: text.split()
    )


def _judged(
    response: Response,
    run: Callable[[str], Ran],
    expected: list[Any],
    read: Callable[[Any], Any] = lambda value: value,
) -> Verdict:
    blocks = re.findall(r"```python\n(.*?)```", response.text, re.S)
    if not blocks:
        return Verdict("no_answer", None, "no block of code")
    ran = run(blocks[-1])
    if ran.ending != "done":
        return Verdict("wrong", blocks[-1], ran.reason)
    passed = sum(read(got) == read(wanted) for got, wanted in zip(ran.outputs, expected, strict=True))
    verdict = "correct" if passed == len(expected) else "wrong"
    return Verdict(verdict, blocks[-1], f"{passed} of {len(expected)} tests pass")
