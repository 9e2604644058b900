"""Damaged inputs for every reader, a bounded number with a fixed seed; the long run is `python -m tests.fuzz`."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.reader import Reader
from tests.fuzz.readers import all_readers
from tests.fuzz.run import fuzz

COUNT = {"tokenizer.json": 8, "tokenizer_config.json": 8, "chat_template": 8, "prompts": 30, "sft": 30, "texts": 30}
"""Of damaged inputs where each takes long; 60 elsewhere."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    return all_readers(tmp_path_factory.mktemp("fuzz"))


def test_a_damaged_input_is_an_error_that_names_it_or_is_read_right(readers: list[Reader]) -> None:
    tallies = [fuzz(reader, COUNT.get(reader.name, 60), seed=1) for reader in readers]
    assert not any(tally.leaks for tally in tallies), "\n".join(tally.line() for tally in tallies if tally.leaks)
    one_sided = [tally.name for tally in tallies if not tally.refused]
    assert not one_sided, f"nothing damages the inputs of {one_sided}"


def test_the_same_seed_damages_alike(readers: list[Reader]) -> None:
    for reader in readers:
        one, other = (reader.damaged(random.Random(5)) for _ in range(2))
        assert one == other
