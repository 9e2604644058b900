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
        (r"Compute $7.5+1$ and give your answer in \boxed{}.", r"Compute $7.9-3$ and give your answer in \boxed{}."),
        (r"Let $f(x)=x^2$. Compute $f(3)$ in \boxed{}.", r"Let $f(x)=x^2$. Compute $f(4)$ in \boxed{}."),
        ("Think step by step and find the sum of 3 and 4.", "Think step by step and find the sum of 5 and 4."),
        ("He solved 5 problems. Is the answer a fraction?", "He solved 5 problems. Is the answer an integer?"),
        ("Compute $5!$", "Compute $5$"),
        ("Find $(xy)^2$.", "Find $xy^2$."),
        ("Find $3(ab)!$.", "Find $3ab!$."),
        ("$7!-6!$", "$7-6$"),
        ("$(ab)!$", "$(ab)$"),
        ("Is $n ! > 9$?", "Is $n>9$?"),
        ("Is x != 3?", "Is x = 3?"),
        ("$5!!$", "$5!$"),
        ("Find f'(3).", "Find f(3)."),
        ("Find $y''$.", "Find $y'$."),
        ("Find $(fg)'(1)$.", "Find $(fg)(1)$."),
        ("Find $A'B'$.", "Find $A'B$."),
        ("as 3:4", "as 3 4"),
        ("as $a : b$", "as $a b$"),
        ("Compute $.5+1$.", "Compute $5+1$."),
        ("The sum of 1, 2, ..., 10", "The sum of 1, 2, 10"),
        ("Compute 3².", "Compute 32."),
        ("Solve x₁+2=0.", "Solve x¹+2=0."),
        ("Compute 1½.", "Compute 11/2."),
        (r"Compute $\frac12 3$.", r"Compute $\frac1{23}$."),
        ("Is 3 ≤ x?", "Is 3 < x?"),
        (r"Is $\{x+1\}$ 2?", "Is $x+1$ 2?"),
        (r"Find $f^{\prime}(3)$.", "Find $f(3)$."),
    ],
)
def test_what_changes_the_formula_makes_another_question(one: str, other: str) -> None:
    assert words(one) != words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"$\left(2+3\right)\cdot{4}$", r"(2 + 3) \cdot 4"),
        ("$2^{10}$", "2^10"),
        ("$(x)^2$ and ${xy}^2$", "x^2 and xy^2"),
        (r"$(x)$ is 3\text{ cm}", r"$x$ is $3$ cm"),
        (r"$\sqrt{(a)}$)", r"\sqrt {a}"),
        ("What is $2+2$?", "What is 2+2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("What is $2+2$?", "What is 2+2? Let's think step by step and output the final answer within \\boxed{}.\n"),
        ("What is $2+2$?", "What is 2+2? Put the letter of the right option within \\boxed{}."),
        ("Please reason step by step.", "please reason step by step"),
        ("What is $2+2$?", r"Solve the problem. Put your final answer within \boxed{}. What is $2+2$?"),
        ("What is $2+2$?", "Read carefully. Think step by step. What is $2+2$?"),
        ("What is $x=2.$", r"What is $x=2.$ Please reason step by step, and put the answer in \boxed{your answer}."),
        ("Compute $7.5+1$.", r"Compute $7.5+1$, and then give your answer, as a fraction, in \boxed{}."),
        ("求2+2的值？", r"求2+2的值？请逐步推理，并将最终答案放在\boxed{}中。"),
        ("What is $2+2$?", "Question: What is $2+2$?\n\nAnswer:"),
        (
            "What is $2+2$?",
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is $2+2$?\n\n"
            'Remember to put your answer on its own line after "Answer:".',
        ),
        ("How many!", "how many"),
        ("He cries. How many (of us) are Tom's 'best' 'a'?", 'He cries... How many (of us!) are Tom’s "best" "a"?'),
        ("Compute $5!$ as $3:4$", "compute {5} ! as $3$ : $4$"),
        ("Two numbers: 3 and 4", "two numbers, 3 and 4"),
        (r"Is $n!>2$ or \[f(x)=1\] for \$5 and 5\%?", r"is \(n!>2\) or $f(x)=1$ for $5 and 5%"),
        # As it is copied from a page or a PDF, against LaTeX.
        ("Let 2π − 3 ≤ x² + y² and α₁ ≠ ∞", r"Let $2\pi-3 \le x^2+y^2$ and $\alpha_1\ne\infty$"),
        ("Find 𝑥ⁿ⁺¹ × ½ − √3·𝜃", r"Find $x^{n+1}\times\frac12-\sqrt{3}\cdot\theta$"),
        ("Is 1 + 2 + … + n ≥ 100° in △ABC?", r"Is $1+2+\cdots+n\geqslant 100^{\circ}$ in $\triangle ABC$?"),
        ("x\u2061(3)\u200b of\u00a0a co\u00adoperative １２", "x(3) of a cooperative 12"),
        ("Poincare\u0301 and ﬁve", "Poincar\u00e9 and five"),
        # Spelled in two ways by LaTeX's authors.
        (r"$\int_0^1 x^2\,dx$", r"$\int_0^1 x^2 dx$"),
        (r"$a\;b\ c$", "$a b c$"),
        (r"$f^{\prime}(3)+g^{\prime \prime}(x)$", "$f'(3)+g''(x)$"),
        (r"\operatorname {gcd}(a,b) and \mathbf {v}, \mathbb{R}, \textit{ s }", r"\gcd(a,b) and v, ℝ, s"),
        (r"\begin{align*} x+y &= 1 \\ x-y &= 3 \end{align*}", r"\begin{align*}x+y=1\\x-y=3\end{align*}"),
        (r"Compute $\sin 3 \times \tan 4$", "compute sin 3 times tan 4"),
        (r"$\tfrac34\bigl(x+y\Big)$", r"$\dfrac{3}{4}\left(x+y\right)$"),
        (r"$3/14 \lt x\to 0$", r"$\frac{3}{14}<x\rightarrow 0$"),
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


def test_a_short_evaluation_question_is_found_in_the_symbols_of_a_page() -> None:
    evaluation = EvaluationQuestions(0.6)
    evaluation.add("math:1", r"Simplify $(u+4)(u-1) - (u-3)(u+6)$.")
    assert evaluation.find("Simplify (u+4)(u−1) − (u−3)(u+6).") == ("math:1", 1.0)
    assert evaluation.find("Simplify (u+4)(u−1) + (u−3)(u+6).") != ("math:1", 1.0)


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
