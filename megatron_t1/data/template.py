"""Conversations into token ids, by the tokenizer and chat template that the checkpoint brings.

Control tokens come from the template alone: a person's text that spells `<|im_end|>` is text, letter by letter. Left
out: code that comes with a checkpoint (`trust_remote_code` stays off), and which tokens are targets (`packing.py`).
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_t1.data.config import CHAT_TEMPLATES, DataConfig
from megatron_t1.data.tokenizer import load_tokenizer
from megatron_t1.types import Message

_OPENED = re.compile(r"<(?:think|thinking|thought)>\s*$", re.I)
_OPENING = re.compile(r"\s*<(?:think|thinking|thought)>", re.I)
_CLOSING = re.compile(r"</(?:think|thinking|thought)>", re.I)
_LONGEST_OPENING = 16  # tokens
_BATCH = 1000  # texts tokenised at a time: many are quicker, all at once would take 100 bytes a token


def opened_thinking(tokenizer: Any, prompt_ids: Sequence[int] | np.ndarray) -> str:
    """The `<think>` and the space behind it that a prompt ends with, as the templates of R1's distillates have it.

    The response begins inside that thinking; its text alone would not show it. '' for other prompts.
    """
    opened = _OPENED.search(tokenizer.decode(prompt_ids[-_LONGEST_OPENING:]))
    return opened[0] if opened else ""


class Template:
    """Tokenizer and chat template of a Hugging Face folder."""

    def __init__(self, model_dir: Path, data: DataConfig | None = None) -> None:
        """
        Args:
            data: what it says about the chat template.

        Raises:
            ValueError: the folder has no tokenizer, no chat template or no end token; the chat template doesn't read a
                variable that is given.
        """
        data = data or DataConfig()
        self._folder, self._named, self._variables = model_dir, data.chat_template, data.chat_template_kwargs
        self.tokenizer: Any = load_tokenizer(model_dir)
        if self._named:
            self.tokenizer.chat_template = CHAT_TEMPLATES[self._named]()
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model_dir}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{model_dir}: the tokenizer has no end token; set eos_token in tokenizer_config.json")
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        if self._variables:
            self._check_variables()
        self._control = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._control_pattern = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))))

    def _check_variables(self) -> None:
        """A misspelled one would change nothing, and one that is ours to give would change where the prompt ends."""
        ours = {"messages"} | set(inspect.signature(self.tokenizer.apply_chat_template).parameters)
        for name, value in self._variables.items():
            if name in ours or not re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template)):
                raise ValueError(
                    f"data.chat_template_kwargs has {name} = {value!r:.60}, which is no variable of the chat template "
                    f"of {self._folder}: mend the name, or leave it out"
                )

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """int64 [num_prompt_tokens]: the conversation with the opening of the assistant's turn.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        # What people spelled is hidden from the tokenizer behind marks that no text has.
        mark = f"\ue000{secrets.token_hex(8)}"
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}:{len(hidden) - 1}\ue001"

        if self._control:
            messages = [{**m, "content": self._control_pattern.sub(hide, m["content"])} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self._variables
            )
        except Exception as error:  # a template is a program, which may divide by zero; and so its author refuses
            told = str(error) or type(error).__name__
            raise ValueError(f"the chat template refuses these messages: {told:.500} ({self._folder})") from None
        if not hidden:
            return self.ids(text)
        shown = re.compile(f"{mark}:(\\d+)\ue001")
        ids: list[int] = []
        start = 0
        for control in [*self._control_pattern.finditer(text), None]:
            plain = text[start : control.start() if control else len(text)]
            plain = shown.sub(lambda match: hidden[int(match[1])], plain)
            if plain:
                ids += self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if control:
                ids.append(self._control[control[0]])
                start = control.end()
        return np.array(ids, np.int64)

    def keep_in(self, model_dir: Path) -> None:
        """Give a model that was trained with a plugin's chat template that template; others have theirs."""
        if self._named:
            (model_dir / "chat_template.jinja").write_text(self.tokenizer.chat_template, encoding="utf-8")

    def check_response(self, text: str) -> None:
        """
        Raises:
            ValueError: the text of an answer spells a control token, which the model would learn to say in letters.
        """
        if self._control and (spelled := self._control_pattern.search(text)):
            raise ValueError(
                f'"response" contains the control token {spelled[0]}: leave it out, the end of the turn is added'
            )

    def without_opening(self, response: str, prompt_ids: np.ndarray) -> str:
        """What is left of a whole response for a model whose prompt has opened the thinking already.

        Raises:
            ValueError: the response never closes it.
        """
        opened = opened_thinking(self.tokenizer, prompt_ids)
        if not opened:
            return response
        if not _CLOSING.search(response):
            raise ValueError(
                f"the chat template opens the thinking ({opened.strip()}) and the response never closes it: put "
                "</think> before its answer"
            )
        begun = _OPENING.match(response)
        rest = response[begun.end() :] if begun else response
        return rest.lstrip() if opened[-1].isspace() else rest

    def response_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 [num_response_tokens] of each text: the assistant's words and the end token."""
        responses: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            batch = self.tokenizer(list(texts[start : start + _BATCH]), add_special_tokens=False)["input_ids"]
            responses += [np.array([*ids, self.eos_token_id], np.int64) for ids in batch]
        return responses

    def ids(self, text: str) -> np.ndarray:
        """int64 [num_tokens] of bare text, nothing added."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
