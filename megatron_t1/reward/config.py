"""What a user says about grading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from megatron_t1 import plugins
from megatron_t1.fields import above, at_least
from megatron_t1.reward.answers.policy import EqualityConfig
from megatron_t1.reward.penalties import PenaltyConfig, Response
from megatron_t1.types import AnswerMode, Verdict

Verifier = Callable[[str, Response], Verdict]
VERIFIERS: plugins.Registry[Verifier] = plugins.Registry("answer mode", in_graders=True)
verifier = VERIFIERS.add
"""Registers `function(gold, response) -> Verdict` as the answer mode of its name. It runs in a grader process."""


def check_mode(mode: Any) -> str:
    """An answer mode that is known; raises ValueError for others."""
    known = (*get_args(AnswerMode), *VERIFIERS)
    if mode not in known:
        raise ValueError(f"mode={mode!r:.60} is not one of {', '.join(known)}")
    return mode


DECIDING = ("penalties", "refuse_copies", "equality")
"""What a verdict depends on: results of another grader are not gone on with."""


@dataclass(kw_only=True, frozen=True)
class RewardConfig:
    """How samples are graded."""

    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    """Bad patterns that replace the reward by -1."""
    deadline_s: float = 1.0
    """CPU seconds one answer may use before its grader is killed; honest answers need 0.3 ms, the worst known 150
    ms, the penalties of a response of 128k tokens 200 ms."""
    num_workers: int = 0
    """Grader processes working at a time; 0 means one a CPU core, at most 8."""
    memory_mb: int = 1024
    """Address space of one grader, in MiB."""
    tasks_per_worker: int = 500
    """Graders are replaced after this many answers: caches and leaks stay small."""
    refuse_copies: bool = True
    """An answer that is a formula of the question, where the gold is its value, is wrong; see docs/grading.md."""
    equality: EqualityConfig = field(default_factory=EqualityConfig)
    """What counts as equal where people differ; see docs/grading.md."""
    alarm_after: int = 64
    """Warn when this many samples in a row have no answer, time out or crash: the format or the grader is broken."""

    def deciding(self) -> dict[str, Any]:
        """What a verdict depends on, as JSON values."""
        own = plugins.identity(plugins.for_graders())
        decided = {name: value for name, value in asdict(self).items() if name in DECIDING}
        return decided | ({"plugins": own} if own else {})

    def __post_init__(self) -> None:
        above(self, 0, "deadline_s")
        at_least(self, 0, "num_workers")
        at_least(self, 512, "memory_mb")
        at_least(self, 1, "tasks_per_worker", "alarm_after")
