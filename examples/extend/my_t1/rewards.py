"""A penalty and two answer modes. Grader processes import this module: nothing here imports torch."""

from __future__ import annotations

import json
import re

from megatron_t1.reward.config import verifier
from megatron_t1.reward.penalties import PenaltyConfig, Response, penalty
from megatron_t1.reward.processes.programs import Programs
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
    blocks = re.findall(r"```python\n(.*?)```", response.text, re.S)
    if not blocks:
        return Verdict("no_answer", None, "no block of code")
    tests = json.loads(gold)
    ran = programs.run(blocks[-1], tests["function"], tests["calls"])  # it never sees what must come out
    if ran.ending != "done":
        return Verdict("wrong", blocks[-1], ran.reason)
    passed = sum(got == wanted for got, wanted in zip(ran.outputs, tests["returns"], strict=True))
    verdict = "correct" if passed == len(tests["calls"]) else "wrong"
    return Verdict(verdict, blocks[-1], f"{passed} of {len(tests['calls'])} calls return what they must")
