"""Question files and SFT files (JSON lines) in; tokenised prompts and sequences out. Bad lines are named, all at once.

A question: {"id", "prompt" or "messages", "answer"}, optionally "mode" and "choices"; everything else is kept as meta.
An SFT example: {"prompt" or "messages", "response"}, or "messages" that end with the assistant's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_t1.data.config import DataConfig
from megatron_t1.data.template import Template
from megatron_t1.data.tokenizer import load_tokenizer
from megatron_t1.files import ENCODING, parse_json
from megatron_t1.reward.config import check_mode
from megatron_t1.types import Message, Prompt, TrainSequence

T = TypeVar("T")
Q = TypeVar("Q", "Question", Prompt)
_MAX_SHOWN, _MAX_LETTERS = 10, 1000
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as a conversation, before any tokenizer has seen it."""

    id: str
    """Unique within its file."""
    messages: list[Message]
    """What is asked; the last message is the user's."""
    gold: str
    """The reference answer."""
    mode: str = "response"
    """How a response is graded."""
    choices: tuple[str, ...] = ()
    """Option texts, for `mode="mc"` only."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever else the line had (level, subject, source)."""

    @property
    def text(self) -> str:
        """The last thing that the user says."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    def prompt(self, template: Template | None) -> Prompt:
        """Tokenised for a server of ours; without a template (an endpoint has its own) with no token ids.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        return Prompt(
            id=self.id,
            text=self.text,
            token_ids=template.prompt_ids(self.messages) if template else np.zeros(0, np.int64),
            gold=self.gold,
            mode=self.mode,
            choices=self.choices,
            meta=self.meta,
            before="\n".join(m["content"] for m in self.messages[:-1]),
        )


def load_prompts(path: Path, template: Template, cfg: DataConfig) -> list[Prompt]:
    """Every question of a file, tokenised.

    Raises:
        ValueError: malformed lines or ids used twice, each named by file and line.
    """
    return parse_rows(path, _unique(lambda row: question_of(row, cfg.system_prompt).prompt(template)))


def load_questions(path: Path, system_prompt: str | None = None) -> list[Question]:
    """Every question of a file, as conversations. Raises as `load_prompts` does."""
    return parse_rows(path, _unique(lambda row: question_of(row, system_prompt)))


def question_of(row: dict[str, Any], system_prompt: str | None = None) -> Question:
    """The question of one line; raises ValueError for what is missing or has a value that is not known."""
    messages = _messages(row, system_prompt)
    choices = given(row, "choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError('"choices" must be a list of strings')
    known = {"id", "prompt", "messages", "answer", "mode", "choices"}
    return Question(
        id=id_of(row),
        messages=messages,
        gold=gold_of(row.get("answer")),
        mode=check_mode(given(row, "mode", "response")),
        choices=tuple(choices),
        meta={name: value for name, value in row.items() if name not in known},
    )


def given(row: dict[str, Any], name: str, default: Any) -> Any:
    """A field's value; tables write null for what is not there."""
    value = row.get(name)
    return default if value is None else value


def id_of(row: dict[str, Any]) -> str:
    """Text, or a whole number as text; raises ValueError for anything else."""
    return str(_need(row, "id", (str, int)))


def is_missing(value: Any) -> bool:
    """None, blank text, or the NaN that stands for a missing value in tables."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def gold_of(value: Any, name: str = "answer") -> str:
    """A reference answer as text: text or a number stays what it is, whatever file it came from.

    Raises:
        ValueError: it is missing, or something else (a list, bytes, a date), whose text nobody would answer.
    """
    if is_missing(value):
        raise ValueError(f'no reference answer: "{name}" is missing or empty')
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise ValueError(f'"{name}" is {value!r:.60}, a {type(value).__name__}; it must be text or a number')
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise ValueError(f'"{name}" is {value}: a number that is too large, or none')
    return str(value).strip()


def _unique(make: Callable[[dict[str, Any]], Q]) -> Callable[[dict[str, Any], int], Q]:
    """`make`, refusing an id that an earlier line has used."""
    seen: dict[str, int] = {}

    def parse(row: dict[str, Any], number: int) -> Q:
        made = make(row)
        if made.id in seen:
            raise ValueError(f'"id" {made.id!r} is already used in line {seen[made.id]}')
        seen[made.id] = number
        return made

    return parse


def load_sft(path: Path, template: Template, cfg: DataConfig) -> list[TrainSequence]:
    """Every example of an SFT file, with the end token after its response.

    Raises:
        ValueError: malformed lines, each named by file and line.
    """

    prompts: dict[str, np.ndarray] = {}  # SFT files hold many responses to one question

    def parse(row: dict[str, Any], number: int) -> tuple[np.ndarray, str]:
        row = _with_response(row)
        messages = _messages(row, cfg.system_prompt)
        key = json.dumps(messages)
        if key not in prompts:
            prompts[key] = template.prompt_ids(messages)
        response = _need(row, "response", (str,))
        template.check_response(response)
        return prompts[key], template.without_opening(response, prompts[key])

    examples = parse_rows(path, parse)
    responses = template.response_ids([response for _, response in examples])
    return [
        TrainSequence(prompt_ids=prompt_ids, response_ids=response_ids)
        for (prompt_ids, _), response_ids in zip(examples, responses, strict=True)
    ]


def load_texts(path: Path, model_dir: Path) -> list[TrainSequence]:
    """What `t1 logprobs` scores: texts, conversations or token ids; the response is what gets logprobs.

    A line has "prompt" or "messages" with "response"; or "messages" that end with the assistant; or "text", of which
    all but the first token count (control tokens in it are such); or "token_ids" and, optionally, "num_prompt_tokens".

    Raises:
        ValueError: malformed lines, each named by file and line.
    """
    tokenizer = load_tokenizer(model_dir)
    template = Template(model_dir) if tokenizer.chat_template else None

    def parse(row: dict[str, Any], number: int) -> TrainSequence:
        ids = row.get("token_ids")
        if ids is None and row.get("text") is not None:
            ids = tokenizer(_need(row, "text", (str,)), add_special_tokens=False)["input_ids"]
        if ids is not None:
            num_prompt = given(row, "num_prompt_tokens", 1)
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
                raise ValueError(f'"token_ids" must be a list of numbers from 0 to {len(tokenizer) - 1}')
            if type(num_prompt) is not int or not 0 < num_prompt < len(ids):
                raise ValueError(f"{len(ids)} tokens with num_prompt_tokens = {num_prompt}: nothing is left to score")
            return TrainSequence(prompt_ids=np.array(ids[:num_prompt]), response_ids=np.array(ids[num_prompt:]))
        if template is None:
            raise ValueError(f'{model_dir} has no chat template: give "text" or "token_ids"')
        row = _with_response(row)
        response = _need(row, "response", (str,))
        template.check_response(response)
        prompt_ids = template.prompt_ids(_messages(row, None))
        response = template.without_opening(response, prompt_ids)
        return TrainSequence(prompt_ids=prompt_ids, response_ids=template.response_ids([response])[0])

    return parse_rows(path, parse)


def parse_rows(
    path: Path,
    parse: Callable[[dict[str, Any], int], T],
    rows: Iterable[tuple[int, Any]] | None = None,
    *,
    halves: bool = False,
) -> list[T]:
    """`parse(row, line number)` of every line of a JSON lines file, or of `rows` when another reader read them.

    Args:
        halves: as `parse_json` has it.

    Raises:
        ValueError: all the lines that are no JSON object or that `parse` refuses, each named by file and line.
    """
    parsed, errors = [], []
    for number, row in _lines(path) if rows is None else rows:
        try:
            if rows is None:
                _refuse_bytes(row)
                row = parse_json(row, halves=halves)
            if not isinstance(row, dict):
                raise ValueError(f"must be an object in braces, is a {type(row).__name__}")
            parsed.append(parse(row, number))
        except ValueError as error:
            errors.append(f"{path}:{number}: {error!s:.{_MAX_LETTERS}}")
    if errors:
        more = f"\n... and {len(errors) - _MAX_SHOWN} more" if len(errors) > _MAX_SHOWN else ""
        raise ValueError(f"{len(errors)} bad lines; mend or remove them:\n" + "\n".join(errors[:_MAX_SHOWN]) + more)
    if not parsed:
        raise ValueError(f"{path} has no lines")
    return parsed


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        # What is not UTF-8 comes as halves of surrogate pairs: the line it stands in is known then.
        with path.open(encoding=ENCODING, errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None


def _refuse_bytes(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(f"not UTF-8 text (byte 0x{byte:02x} at column {error.start + 1})") from None


def _need(row: dict[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    value = row.get(name)
    if is_missing(value):
        raise ValueError(f'"{name}" is missing or empty')
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f'"{name}" is {value!r:.60}; it must be a {" or ".join(kind.__name__ for kind in kinds)}')
    return value


def _with_response(row: dict[str, Any]) -> dict[str, Any]:
    """An example whose response was the last of its messages, with that apart."""
    messages = row.get("messages")
    if row.get("response") is not None or not (isinstance(messages, list) and messages):
        return row
    if not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        raise ValueError('without "response", "messages" must end with the assistant')
    return {**row, "messages": messages[:-1], "response": messages[-1].get("content")}


def _messages(row: dict[str, Any], system_prompt: str | None) -> list[Message]:
    if (row.get("prompt") is None) == (row.get("messages") is None):
        raise ValueError('give either "prompt" or "messages"')
    messages = row.get("messages") or [{"role": "user", "content": _need(row, "prompt", (str,))}]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(
            f'"messages" must be a list of {{"role": one of {_ROLES}, "content": text}}, the last of the user '
            "and not blank"
        )
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages
