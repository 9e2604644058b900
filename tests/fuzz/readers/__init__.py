"""Every reader of what others wrote: valid inputs, how it is called, what may come of a damaged one."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.reader import Reader
from tests.fuzz.readers.config import config_reader
from tests.fuzz.readers.data import question_readers, set_readers
from tests.fuzz.readers.models import model_readers
from tests.fuzz.readers.replies import reply_readers
from tests.fuzz.readers.state import state_readers
from tests.tiny import make_tiny_tokenizer


def all_readers(tmp: Path) -> list[Reader]:
    model = tmp / "tokenizer"
    make_tiny_tokenizer(model)
    return [
        *question_readers(tmp, model),
        *set_readers(tmp),
        config_reader(tmp),
        *model_readers(tmp, model),
        *state_readers(tmp),
        *reply_readers(tmp),
    ]
