"""What a user says about grading."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_t1.reward.penalties import PenaltyConfig


@dataclass(kw_only=True, frozen=True)
class RewardConfig:
    """How samples are graded."""

    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    """Bad patterns that replace the reward by -1."""
    deadline_s: float = 0.5
    """CPU seconds one answer may use before its grader is killed; honest answers need 0.3 ms, the worst known 15 ms."""
    num_workers: int = 0
    """Grader processes working at a time; 0 means one a CPU core, at most 8."""
    memory_mb: int = 1024
    """Address space of one grader, in MiB."""
    tasks_per_worker: int = 500
    """Graders are replaced after this many answers: caches and leaks stay small."""
    alarm_after: int = 64
    """Warn when this many samples in a row have no answer, time out or crash: the format or the grader is broken."""

    def __post_init__(self) -> None:
        if self.deadline_s <= 0:
            raise ValueError(f"reward.deadline_s = {self.deadline_s} must be positive: CPU seconds, such as 0.5")
        if self.num_workers < 0:
            raise ValueError(f"reward.num_workers = {self.num_workers} must be 0 (one a core) or more")
        if self.memory_mb < 512:
            raise ValueError(f"reward.memory_mb = {self.memory_mb} must be at least 512, or graders do not start")
        for name in ("tasks_per_worker", "alarm_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.{name} = {getattr(self, name)} must be at least 1")
