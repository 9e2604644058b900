"""What a job refuses before it brings anything up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_t1.data.config import INSTRUCTION
from megatron_t1.pipeline import _refuse_overlap


def prompts(*texts: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(text=text) for text in texts]


def test_a_held_out_question_is_known_in_any_dress() -> None:
    train = prompts(f"What is $7+8$?\n\n{INSTRUCTION}", "What is 1+1?")
    with pytest.raises(ValueError, match=r"1 held-out .* for example 'what is 7 \+ 8'"):
        _refuse_overlap(train, prompts("what is 7 + 8", "What is 2+2?"))
    _refuse_overlap(train, prompts("What is 7-8?", "What is 1+1+1?"))
