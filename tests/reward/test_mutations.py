"""Spellings and changes made of the shipped golds, and the failures that users found, by kind."""

from __future__ import annotations

import random

import pytest

from megatron_t1.reward.answers.verify import verify
from tests.reward.cases import rows
from tests.reward.mutations import CHANGED, EQUAL, Mutation

MOST_MISSED, MOST_ACCEPTED = 0.004, 0.002


def _golds() -> list[str]:
    cases = [row["gold"] for row in rows("cases") if row["mode"] in ("answer", "response") and len(row["gold"]) < 200]
    return list(dict.fromkeys([*cases, *(row["answer"] for row in rows("math500"))]))


def _verdicts(mutations: dict[str, Mutation]) -> list[tuple[tuple[str, str, str], bool]]:
    """((kind, gold, its mutation), whether it is accepted)."""
    made = [
        (kind, gold, mutation(gold, random.Random(gold + kind)))
        for kind, mutation in mutations.items()
        for gold in _golds()
    ]
    return [
        ((kind, gold, text), verify(gold, text, "answer").outcome == "correct") for kind, gold, text in made if text
    ]


def test_other_spellings_are_accepted() -> None:
    verdicts = _verdicts(EQUAL)
    missed = [mutation for mutation, accepted in verdicts if not accepted]
    assert len(missed) < MOST_MISSED * len(verdicts), missed


def test_changed_answers_are_not() -> None:
    verdicts = _verdicts(CHANGED)
    wrong = [mutation for mutation, accepted in verdicts if accepted]
    assert len(verdicts) > 1000
    assert len(wrong) < MOST_ACCEPTED * len(verdicts), wrong


@pytest.mark.parametrize("name", ["field", "kinds", "formats", "unseen", "unseen2", "unseen3"])
def test_what_users_found_and_more_of_its_kinds(name: str) -> None:
    verdicts = [
        (row, verify(row["gold"], row["prediction"], row["mode"], tuple(row.get("choices", ())))) for row in rows(name)
    ]
    wrong = [(row["id"], verdict) for row, verdict in verdicts if (verdict.outcome == "correct") != row["expected"]]
    assert [each for each, _ in wrong] == [row["id"] for row, _ in verdicts if row.get("open")], wrong
