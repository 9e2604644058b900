"""Prompt files: what is asked at each stage, and with which sampling. A user copies and edits them.

A stage is a YAML file: `messages`, each with a `role` and a Jinja template as `content`; a last message of the
assistant is continued. Beside it `temperature`, `top_p`, `max_tokens`, `stop`; `expect`: {right, wrong} -> regular
expression that a critique of such an attempt must match; `keep_thinking`: whether a <think> part is part of the result.
`response.j2` makes the SFT response of a finished chain.

The names in the templates: question, gold, attempt (critique), attempts (integrate), chain (rewrite, response), answer
(response). An attempt has text, thinking, answer, correct, critique. Text of models and data is put in as it is and is
never a template itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from megatron_t1.files import parse_yaml, read_text
from megatron_t1.types import Message

STAGES = ("attempt", "critique", "integrate", "rewrite")
_DEFAULTS = Path(__file__).parent / "prompts"
_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


class _MessageFile(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _StageFile(msgspec.Struct):
    messages: Annotated[list[_MessageFile], msgspec.Meta(min_length=1)]
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.7
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 8192
    stop: tuple[str, ...] = ()
    expect: dict[Literal["right", "wrong"], str] = {}
    keep_thinking: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One prompt file, read."""

    name: str
    messages: tuple[tuple[str, Template], ...]
    """(role, template of the content)"""
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    expect: dict[Literal["right", "wrong"], re.Pattern[str]]
    """What a critique of such an attempt must match."""
    keep_thinking: bool

    def render(self, **values: Any) -> list[Message]:
        """The messages; raises ValueError when a template fails on these values."""
        try:
            return [{"role": role, "content": template.render(**values)} for role, template in self.messages]
        except (TemplateError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"prompt {self.name}.yaml: {error}") from None


@dataclass(frozen=True)
class Prompts:
    stages: dict[str, Stage]
    response: Template

    def __getitem__(self, name: str) -> Stage:
        return self.stages[name]


def load(folder: Path | None) -> Prompts:
    """The prompts of `folder`, and the package's for the files that it lacks.

    Raises:
        ValueError: a file that is no such YAML or template, named.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"prompts = {folder} must be a folder")
    if folder is not None:
        known = {*(f"{name}.yaml" for name in STAGES), "response.j2"}
        if unknown := sorted(path.name for path in folder.iterdir() if path.name not in known):
            raise ValueError(f"prompts = {folder} must hold prompt files alone: {unknown} are none of {sorted(known)}")

    def find(name: str) -> Path:
        edited = folder / name if folder else None
        return edited if edited and edited.exists() else _DEFAULTS / name

    response = find("response.j2")
    return Prompts(
        {name: _stage(name, find(f"{name}.yaml")) for name in STAGES}, _template(response, read_text(response))
    )


def _stage(name: str, path: Path) -> Stage:
    try:
        written = parse_yaml(read_text(path))
        if isinstance(written, dict) and (unknown := set(written) - set(_StageFile.__struct_fields__)):
            raise ValueError(f"unknown keys {sorted(map(str, unknown))}")
        stage = msgspec.convert(written, _StageFile)
        return Stage(
            name=name,
            messages=tuple((message.role, _template(path, message.content)) for message in stage.messages),
            temperature=stage.temperature,
            top_p=stage.top_p,
            max_tokens=stage.max_tokens,
            stop=stage.stop,
            expect={kind: re.compile(pattern) for kind, pattern in stage.expect.items()},
            keep_thinking=stage.keep_thinking,
        )
    except (OSError, ValueError, re.error) as error:
        raise ValueError(f"prompt file {path}: {error}") from None


def _template(path: Path, text: str) -> Template:
    try:
        return _ENVIRONMENT.from_string(text.rstrip("\n"))
    except TemplateError as error:
        raise ValueError(f"prompt file {path}: {error}") from None
