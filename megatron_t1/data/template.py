"""The only place where text becomes token ids: the checkpoint's own tokenizer and chat template.

Left out: code that comes with a checkpoint (`trust_remote_code` stays off) and any template of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Message = dict[str, str]
_BATCH = 1000  # texts tokenised at a time: many are quicker, all at once would take 100 bytes a token


class Template:
    """Tokenizer and chat template of a Hugging Face folder."""

    def __init__(self, model_dir: Path) -> None:
        """
        Raises:
            ValueError: the folder has no tokenizer, no chat template or no end token.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model_dir}: its tokenizer can't be loaded: {error}") from None
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model_dir}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{model_dir}: the tokenizer has no end token; set eos_token in tokenizer_config.json")
        self.eos_token_id = int(self.tokenizer.eos_token_id)

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """int64 [num_prompt_tokens]: the conversation with the opening of the assistant's turn.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return self.ids(text)

    def response_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 [num_response_tokens] of each text: the assistant's words and the end token."""
        found: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            batch = self.tokenizer(list(texts[start : start + _BATCH]), add_special_tokens=False)["input_ids"]
            found += [np.array([*ids, self.eos_token_id], np.int64) for ids in batch]
        return found

    def ids(self, text: str) -> np.ndarray:
        """int64 [num_tokens] of bare text, nothing added."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
