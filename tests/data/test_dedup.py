"""Questions that are the same, and questions that only look alike."""

from __future__ import annotations

import pytest

from megatron_t1.data.config import INSTRUCTION
from megatron_t1.data.dedup import EvaluationQuestions, TrainingQuestions, refuse_shared, words

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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"$(2+3)\cdot 4$", r"$2+3\cdot 4$"),
        ("$2^{n+1}$", "$2^n+1$"),
        (r"\sqrt{2x}", r"\sqrt{2}x"),
        (r"\frac{a+b}{c}", r"\frac{a}{c}+b"),
        (r"Find $f(x+1)$.", r"Find $f(x)+1$."),
        ("He walks. Then he thinks step by step. How far?", "He walks."),
    ],
)
def test_what_changes_the_formula_makes_another_question(one: str, other: str) -> None:
    assert words(one) != words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"$\left(2+3\right)\cdot{4}$", r"(2 + 3) \cdot 4"),
        ("$2^{10}$", "2^10"),
        (r"$(x)$ is 3\text{ cm}", r"$x$ is $3$ cm"),
        (r"$\sqrt{(a)}$)", r"\sqrt {a}"),
        ("What is $2+2$?", "What is 2+2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("What is $2+2$?", "What is 2+2? Let's think step by step and output the final answer within \\boxed{}.\n"),
        ("What is $2+2$?", "What is 2+2? Put the letter of the right option within \\boxed{}."),
        ("Please reason step by step.", "please reason step by step"),
    ],
)
def test_what_does_not_change_the_formula_makes_none(one: str, other: str) -> None:
    assert words(one) == words(other)
    assert words(one)


def test_an_evaluation_question_without_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="x:3 holds no question"):
        EvaluationQuestions(0.6).add("x:3", " ? ")


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


def test_a_held_out_question_is_known_in_any_dress() -> None:
    train = [f"What is $7+8$?\n\n{INSTRUCTION}", "What is 1+1?"]
    with pytest.raises(ValueError, match=r"1 held-out .* for example 'what is 7 \+ 8'"):
        refuse_shared(train, ["what is 7 + 8", "What is 2+2?"])
    refuse_shared(train, ["What is 7-8?", "What is 1+1+1?"])
