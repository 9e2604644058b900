"""What a user says about questions and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_t1.fields import known
from megatron_t1.plugins import Registry

CHAT_TEMPLATES: Registry[Callable[[], str]] = Registry("chat template")
"""Functions that return Jinja, as tokenizers have it."""
QUESTION_SETS: Registry[Callable[[Path | None], Iterable[dict[str, Any]]]] = Registry("question set")
"""evaluate.sets_dir -> the set's rows, in a layout that `sets.load_set` knows."""
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def set_name(name: str) -> str:
    """What a set's results are filed under: its name, or the stem of its file."""
    return name if name in QUESTION_SETS else Path(name).stem


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files of questions and examples, JSON lines."""

    sft: str | None = None
    """SFT examples: {"prompt" or "messages", "response"}, or {"messages"} that end with the assistant's."""
    train: str | None = None
    """Questions that RL trains on: {"id", "prompt" or "messages", "answer"}."""
    heldout: str | None = None
    """Questions for evaluation; none of them may be in `train`."""
    system_prompt: str | None = None
    """Put before every question that brings no system message of its own."""

    chat_template: str | None = None
    """Chat template of a plugin, in place of the checkpoint's. The model that a training ends with brings it along; for
    its checkpoints and snapshots name it again."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template reads: {enable_thinking: false}. Name them again wherever the model is asked;
    scaling.answer_model must read them too."""

    def __post_init__(self) -> None:
        if self.chat_template is not None:
            known(self, "chat_template", CHAT_TEMPLATES, self.chat_template)

    def need(self, name: str) -> Path:
        """The path of a file that the command can't do without; raises ValueError when it is not there."""
        value = getattr(self, name)
        if not value:
            raise ValueError(f"data.{name} is not set: give it the path of a JSON lines file")
        if not Path(value).is_file():
            raise ValueError(f"data.{name} = {value} does not exist")
        return Path(value)
