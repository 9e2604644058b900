"""What a user says about synthesis. The prompts, with their sampling, are files: see prompts.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_t1.data.config import INSTRUCTION
from megatron_t1.fields import FieldError, at_least, within
from megatron_t1.reward.config import RewardConfig
from megatron_t1.rollout.config import EndpointConfig
from megatron_t1.servers.config import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which questions and chains are left out. A chain must also be graded right, without a penalty of `reward`."""

    max_pass_rate: float = 0.9
    """Questions that the attempts solve more often are too easy."""
    max_agreement_on_wrong: float = 0.6
    """A question that no attempt solves, while a larger share of them agrees on another answer, is taken for noisy: its
    reference answer is probably wrong."""
    min_chars: int = 20
    """Shortest response, characters."""
    max_chars: int = 60_000
    """Longest response, characters."""
    give_away: tuple[str, ...] = ()
    """More regular expressions (case is ignored) of phrases that only somebody who was told the answer, or who read
    other people's attempts, would write; `filters.py` has the usual ones."""

    def __post_init__(self) -> None:
        for name in ("max_pass_rate", "max_agreement_on_wrong"):
            if not 0 < getattr(self, name) <= 1:
                raise FieldError(name, getattr(self, name), "must lie in (0, 1]")
        within(self, 0, self.max_chars, "min_chars")


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Questions in, SFT chains out."""

    questions: str
    """Question file ({"id", "prompt" or "messages", "answer"}, or a layout of `evaluate.sets`)."""
    out: str
    """Folder of the results and of the cache; the same folder again goes on where it was stopped."""
    plugins: tuple[str, ...] = ()
    """Modules of yours, by their dotted names, that add penalties, answer modes, losses, advantages, model families,
    question sets or chat templates; see docs/extending.md."""
    endpoints: dict[str, EndpointConfig] = field(default_factory=dict)
    """Chat endpoints by names of your choice: {"big": {"urls": ["https://host/v1"], "model": "...", "key_env": "..."}}.
    Replies are stored by the model's name there: for another model of the same name take another `out`."""
    model: str | None = None
    """Hugging Face folder to serve here (by `rollout`) as the endpoint `model`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Servers for `model`."""
    attempt_with: tuple[str, ...] = ()
    """Endpoints that attempt, in turns; empty: all."""
    critique_with: str = ""
    """Endpoint that judges attempts; empty: the first one."""
    integrate_with: str = ""
    """Endpoint that makes one chain of attempts and critiques; empty: the first one."""
    rewrite_with: str = ""
    """Endpoint that rewrites the chain in one voice; empty: the first one."""
    rewrite: bool = True
    """Whether chains are rewritten."""
    prompts: str | None = None
    """Folder of prompt files that replace those of megatron_t1/synthesize/prompts, file by file."""
    instruction: str = INSTRUCTION
    """Put under every question of a known layout (files with "prompt" or "messages" are asked as they are)."""
    num_attempts: int = 8
    """Attempts a question, over all endpoints that attempt."""
    max_wrong: int = 2
    """Wrong attempts (with different answers) that go into a chain."""
    require_wrong: bool = True
    """Leave out questions without a wrong attempt, and chains from which the failure or its correction was smoothed
    away: nothing to notice, nothing to correct."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """What is left out."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The grader of attempts and chains, and its penalties."""
    questions_in_flight: int = 512
    """Questions worked on at the same time, each with several requests."""
    max_failures_in_a_row: int = 20
    """Stop when so many questions in a row, or all of them, got no answer from an endpoint."""
    num_browse: int = 60
    """Questions shown in browse.html."""
    seed: int = 0
    """Decides the sampling seeds and the order of multiple-choice options."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_attempts", "questions_in_flight", "max_failures_in_a_row")
        at_least(self, 0, "max_wrong")
        for name, least in (("max_wrong", 1), ("num_attempts", 2)):  # one of them right, and one wrong
            if self.require_wrong and getattr(self, name) < least:
                rule = f"must be at least {least} with require_wrong = true: no question could have a chain"
                raise FieldError(name, getattr(self, name), rule)
        if not self.endpoints and not self.model:
            raise FieldError("endpoints", self.endpoints, "must name one, or give `model`, a folder to serve here")
        if "model" in self.endpoints and self.model:
            raise FieldError("endpoints", list(self.endpoints), "can't call one `model` when `model` is served here")
        for name in ("attempt_with", "critique_with", "integrate_with", "rewrite_with"):
            value = getattr(self, name)
            chosen = value if name == "attempt_with" else [value]
            if set(filter(None, chosen)) - set(self.names()):
                raise FieldError(name, value, f"must be of the endpoints {list(self.names())}")

    def names(self) -> tuple[str, ...]:
        """All endpoints, the model served here first."""
        return (*(["model"] if self.model else []), *self.endpoints)
