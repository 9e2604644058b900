"""Questions that are the same, and questions that only look alike."""

from __future__ import annotations

import pytest

from megatron_t1.data.dedup import EvaluationQuestions, TrainingQuestions, words

STORY = "A farmer has 17 sheep and 23 goats. He sells 5 sheep and buys 8 goats at the market. How many has he now?"


@pytest.mark.parametrize(
    "other",
    [
        " a farmer has 17 sheep and 23 goats.  He sells 5 sheep, and buys 8 goats at the market. How many has he now",
        STORY.replace("17", "$17$").replace("23", "$23$").replace("goats at", "goats\n at"),
    ],
)
def test_layout_case_and_punctuation_do_not_count(other: str) -> None:
    assert words(other) == words(STORY)
    assert words(r"Find $\dfrac{1}{2}x$.") == words(r"find \left.\frac{1}{2} \, x\right.")


def test_an_evaluation_question_is_found_in_any_dress() -> None:
    evaluation = EvaluationQuestions(0.6)
    evaluation.add("eval:1", STORY)
    evaluation.add("eval:2", "What is $2+2$?")
    assert evaluation.find(STORY.upper()) == ("eval:1", 1.0)
    assert evaluation.find("what is 2 + 2") == ("eval:2", 1.0)  # too short for n-grams, but the same
    assert evaluation.find("What is 2+3?") is None
    inside = evaluation.find("Read the following carefully and think before you answer. " + STORY + " Explain why.")
    assert inside is not None
    assert inside[0] == "eval:1"
    assert inside[1] < 1
    renumbered = evaluation.find(STORY.replace("17", "19"))
    assert renumbered is not None  # the same question with another number is no fair training question either
    assert evaluation.find("A farmer has 12 fields. Each gives 30 bags of wheat. How many bags?") is None


def test_training_questions_differ_by_their_numbers() -> None:
    seen = TrainingQuestions(0.7)
    assert seen.find_or_add("a", STORY, "43") is None
    assert seen.find_or_add("b", STORY.lower(), "43") == ("a", 1.0)
    assert seen.find_or_add("c", STORY.replace("17", "19"), "45") is None  # another question
    reworded = seen.find_or_add("d", STORY.replace("at the market", "on the market"), "43")
    assert reworded is not None
    assert reworded[0] == "a"
    assert 0.7 <= reworded[1] < 1
