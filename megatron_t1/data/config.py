"""What a user says about questions and examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files of questions and examples, JSON lines."""

    sft: str | None = None
    """SFT examples: {"prompt" or "messages", "response"}."""
    train: str | None = None
    """Questions that RL trains on: {"id", "prompt" or "messages", "answer"}."""
    heldout: str | None = None
    """Questions for evaluation; none of them may be in `train`."""
    system_prompt: str | None = None
    """Put before every question that brings no system message of its own."""

    def need(self, name: str) -> Path:
        """The path of a file that the command can't do without; raises ValueError when it is not there."""
        value = getattr(self, name)
        if not value:
            raise ValueError(f"data.{name} is not set: give it the path of a JSON lines file")
        if not Path(value).is_file():
            raise ValueError(f"data.{name} = {value} does not exist")
        return Path(value)
