"""Kinds of right and wrong answers, one line each: (gold, prediction) of whole responses unless said otherwise."""

# ruff: noqa: E501

from __future__ import annotations

import pytest

from megatron_t1.reward.answers.verify import verify

RIGHT = [
    # numbers
    ("0.5", r"\boxed{\frac12}"), ("1.5", r"\boxed{1\frac12}"), (r"\frac{3}{2}", r"\boxed{1 1/2}"),
    ("-3", r"\boxed{−3}"), ("1000000", r"\boxed{1{,}000{,}000}"), ("1000000", r"\boxed{10^6}"), ("0", r"\boxed{0.0}"),
    (r"3.0\times 10^{8}", r"\boxed{3e8}"), (r"-\frac{2}{3}", r"\boxed{\frac{2}{-3}}"), ("120", r"\boxed{5!}"),
    # roundings
    (r"\frac{600}{7}", r"\boxed{85.71}"), ("3.14", r"\boxed{\pi}"), (r"\frac13", r"\boxed{0.3333}"),
    # expressions
    ("x^2-y^2", r"\boxed{(x-y)(x+y)}"), (r"\sqrt{8}", r"\boxed{2√2}"), (r"\tan x", r"\boxed{\frac{\sin x}{\cos x}}"),
    (r"\frac{n(n+1)}{2}", r"\boxed{\binom{n+1}{2}}"), (r"\log_2 3", r"\boxed{\frac{\ln 3}{\ln 2}}"),
    (r"\sin 2x", r"\boxed{2\sin x\cos x}"), ("|x|", r"\boxed{\sqrt{x^2}}"), ("1+2i", r"\boxed{2i+1}"),
    (r"\frac{1}{2}\cot t\cdot u", r"\boxed{\frac{\cos t\cdot u}{2\sin t}}"), ("0", r"\boxed{\sin(\pi)}"),
    (r"F_n=\sum_{k=0}^{n-1}F_kF_{n-k-1}", r"\boxed{F_n=\sum_{k=0}^{n-1}F_{n-k-1}F_k}"),
    # intervals and inequalities
    ("(0,1)", r"\boxed{0<x<1}"), ("x>3", r"\boxed{(3,\infty)}"), (r"x \in [-2,7]", r"\boxed{\{x \mid -2\le x\le 7\}}"),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{x<2 \text{ or } x>3}"), ("x<1", r"\boxed{-x>-1}"),
    (r"\mathbb{R}", r"\boxed{\text{all real numbers}}"),
    # lists, sets, tuples, matrices
    ("2,3", r"$\boxed{2}$ and $\boxed{3}$"), (r"\{1,2\}", r"\boxed{2,1}"), ("(1,2)", r"\boxed{x=1, y=2}"),
    ("(1,2),(3,4)", r"\boxed{\{(3,4),(1,2)\}}"), (r"-1\pm\sqrt3", r"\boxed{-1-\sqrt3,\ -1+\sqrt3}"),
    (r"p=5,q=2;p=7,q=2", r"\boxed{(5,2),(7,2)}"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\langle 1,2\rangle}"),
    (r"\begin{pmatrix}1/5 \\ 2\end{pmatrix}", r"\boxed{\begin{bmatrix} 0.2 \\ 2\end{bmatrix}}"),
    # equations
    ("5", r"\boxed{x=5}"), ("y=2x+3", r"\boxed{2x-y+3=0}"), ("f(x)=x^2", r"\boxed{f(t)=t^2}"), ("xy=6", r"\boxed{\frac6x}"),
    ("-1", r"\boxed{e^{i\pi}=-1}"), (r"k\pi, k\in\mathbb{Z}", r"\boxed{n\pi \ (n \in \mathbb{Z})}"),
    # units, percent, degrees, bases
    ("10", r"\boxed{10 weeks}"), (r"5\sqrt2\text{ cm}", r"\boxed{5\sqrt2}"), (r"\$18.90", r"\boxed{18.9}"),
    (r"50\%", r"\boxed{50}"), ("0.5", r"\boxed{50\%}"), (r"30^\circ", r"\boxed{\frac{\pi}{6}}"), ("12", r"\boxed{12^{th}}"),
    ("2516_8", r"\boxed{2516_{8}}"), ("3:4", r"\boxed{\frac34}"),
    ("5th", r"\boxed{{5^{th}}}"), (r"\text{Friday the 13th}", r"\boxed{\text{Friday the 13^{th}}}"),
    # text
    ("yes", r"\boxed{\text{Yes}}"), (r"\text{Monday}", r"\boxed{Monday}"), (r"\text{none}", r"\boxed{\emptyset}"),
    # where the answer stands
    ("42", "Answer: 41 was wrong.\nAnswer: 42"), ("7", "<think>8</think> The answer is $7$."), ("7", r"\fbox{7}"),
    ("42", r"\boxed{42}<|im_end|>"), ("4", r"\boxed{\boxed{4}}"), ("4", r"\boxed 4"), ("7", "x = 7"),
]  # fmt: skip

WRONG = [
    # tiny against zero, digits beyond a float
    ("0.0000001", r"\boxed{0.0}"), ("0", r"\boxed{10^{-20}}"), ("0", r"\boxed{\frac{\pi}{10^{25}}}"),
    (r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}"), ("2^{1000}", r"\boxed{2^{1000}+1}"),
    (r"3^{2021}-2^{2021}", r"\boxed{3^{2021}-2^{2021}+1}"), (r"\sqrt2\cdot10^{30}", r"\boxed{\sqrt2\cdot10^{30}+1}"),
    ("10000", r"\boxed{9999}"), (r"\pi", r"\boxed{3.14159}"), (r"\frac13", r"\boxed{0.33}"), ("5.001", r"\boxed{5}"),
    # relations that are not the answer
    ("4", r"\boxed{5=4}"), ("4", r"\boxed{1=2=3=4}"), ("4", r"\boxed{3 \to 4}"), ("4", r"\boxed{\neq 4}"),
    ("4", r"\boxed{\ge 4}"), ("4", r"\boxed{>4}"), ("x=5", r"\boxed{y=5}"), ("x+y=0", r"\boxed{0=0}"),
    (r"x\ge 5", r"\boxed{x>5}"), ("0", r"\boxed{x^2-5x+6=0}"), ("y=2x+3", r"\boxed{y=2x-3}"), ("4", r"\boxed{x=x}"),
    ("x^2=4", r"\boxed{2}"),
    # hedges and shotgun lists
    ("2", r"$\boxed{2}$ or $\boxed{3}$"), ("2", r"\boxed{2 \text{ or } 3}"), ("1,2", r"\boxed{1,2,3}"),
    ("1,2,3", r"\boxed{1,2}"), ("4", r"\boxed{\text{not }4}"), ("4", r"\boxed{\pm 4}"), ("7", r"\boxed{x=7, y=3}"),
    # order and brackets
    ("ACB", r"\boxed{ABC}"), (r"\text{east}", r"\boxed{\text{seat}}"), ("(1,2)", r"\boxed{(2,1)}"),
    ("[1,2]", r"\boxed{(1,2)}"), ("(3,1)", r"\boxed{\{1,3\}}"), ("x=1,y=2", r"\boxed{x=2,y=1}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}"),
    # units, percent, bases
    (r"5\text{ hours}", r"\boxed{5\text{ minutes}}"), ("4", r"\boxed{4\%}"), ("0.04", r"\boxed{4}"),
    ("2516_8", r"\boxed{2516_{16}}"), ("2516_8", r"\boxed{2516}"), (r"30^\circ", r"\boxed{\frac{\pi}{3}}"),
    ("3:4", r"\boxed{4:3}"),
    # expressions that need an assumption, other variables
    (r"\sqrt{x^2}", r"\boxed{x}"), ("x^2", r"\boxed{y^2}"), ("a", r"\boxed{A}"), ("4", r"\boxed{x}"),
    (r"k\pi", r"\boxed{2k\pi}"), ("4", r"\boxed{4!}"),
    # where no answer stands
    ("4", r"<think>\boxed{4}"), ("4", r"<think>\boxed{4}</think> I do not know."), ("4", r"4 \boxed{}"),
    ("4", r"\boxed{4"), ("4", r"The final answer is $4$. \boxed{5}"), ("4", r"\boxed{3} then \boxed{4} then \boxed{5}"),
]  # fmt: skip

CHOICES = [
    ("C", r"\boxed{\textbf{(C)}\ 12}", "C"), ("C", "**Answer:** C", "C"), ("C", "c", "C"), ("D", "It is not A, so the answer is D", "D"),
    ("C", "C or D", None), ("C", "not C", None), ("C", "The answer is C, D.", None), ("B", "The answer is both A and C.", None),
    ("B", "A B C D", None), ("A", "A is my guess; answer is B", "B"), ("C", "<think>Answer: C</think>I am not sure.", None),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction"), RIGHT)
def test_right(gold: str, prediction: str) -> None:
    verdict = verify(gold, prediction)
    assert verdict.outcome == "correct", verdict


@pytest.mark.parametrize(("gold", "prediction"), WRONG)
def test_wrong(gold: str, prediction: str) -> None:
    verdict = verify(gold, prediction)
    assert verdict.outcome in ("wrong", "no_answer"), verdict


SENTENCES = [  # gold, a response without a box, whether it is right
    ("17", "The answer is $17$ because $20-3=17$.", True), ("17", "The answer is $17$, since 3 less than 20 is 17.", True),
    ("2,3", "Answer: $2$ and $3$", True), ("x=1,y=2", "Answer: $x=1$ and $y=2$.", True), ("0.5", "The answer is $\\frac12$ or $0.5$.", True),
    ("12", "The answer is that the total or overall count is 12.", True), ("5", "Answer: $5$ apples and then he left.", True),
    ("7", "The answer is $7$ cm or $8$ cm", False), ("7", "The answer is $7$ or maybe $8$.", False), ("7", "Answer: $7$\nor $8$", False),
    ("7", "The answer is either 6 or that it is 7.", False), ("7", "The answer is that the sum is 6 or the sum is 7.", False),
    ("7", "Answer: \\(7\\), \\(9\\)", False), ("7", 'The result is "7" or even "9"', False), ("7", "Answer: $$7$$ / 9", False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction", "right"), SENTENCES)
def test_an_answer_in_a_sentence(gold: str, prediction: str, right: bool) -> None:
    assert (verify(gold, prediction).outcome == "correct") == right


def test_a_label_of_another_quantity_is_right_where_it_is_asked_for() -> None:
    answer = r"\boxed{\text{the reciprocal is }5}"
    assert verify("5", answer).outcome == "wrong"
    assert verify("5", answer, question=r"Find the reciprocal of $\frac15$.").outcome == "correct"


@pytest.mark.parametrize(("gold", "prediction", "letter"), CHOICES)
def test_multiple_choice(gold: str, prediction: str, letter: str | None) -> None:
    verdict = verify(gold, prediction, "mc")
    assert verdict.extracted == letter
    assert (verdict.outcome == "correct") == (letter == gold)


def test_an_option_may_be_chosen_by_its_text() -> None:
    options = ("London", "Paris", "Berlin")
    assert verify("B", r"\boxed{\text{Paris}}", "mc", options).outcome == "correct"
    assert verify("Paris", "The answer is B.", "mc", options).outcome == "correct"
    assert verify("B", r"\boxed{\text{Berlin}}", "mc", options).outcome == "wrong"


def test_percents_are_accepted_where_the_question_asks_for_them() -> None:
    question = "What percent of the class has a dog?"
    assert verify("40", r"\boxed{40\%}", question=question).outcome == "correct"
    assert verify("40", r"\boxed{40\%}", question="A shirt with 20% off costs how much?").outcome == "wrong"
    assert verify("40", r"\boxed{41\%}", question=question).outcome == "wrong"
    for asked in ("A price of 100 is increased by 20 percent. What is it?", "In 5 percent of 800 cases, how many?"):
        assert verify("40", r"\boxed{40\%}", question=asked).outcome == "wrong"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(r"\frac{\pi}{2}", r"\pi/2"), (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"), (r"2\sqrt{3}", r"\sqrt{3}\cdot 2")],
)
def test_another_spelling_of_the_gold_is_no_copy(gold: str, answer: str) -> None:
    question = r"For $0\le x\le \pi/2$, with sides $\frac{\sqrt{3}}{2}$ and $2\sqrt{3}$, find it."
    assert verify(gold, rf"\boxed{{{answer}}}", question=question).outcome == "correct"


@pytest.mark.parametrize(
    ("gold", "copy"),
    [
        ("23", r"3+4\cdot 5"), ("23", r"4 \times 5 + 3"), ("x+2", "2(x+1)-x"), (r"\frac{\pi}{4}", r"\arctan 1"),
        (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}"),
    ],
)  # fmt: skip
def test_a_formula_of_the_question_is_no_answer(gold: str, copy: str) -> None:
    question = r"Find $3+4\cdot 5$, simplify $2(x+1)-x$ and $\frac{2}{\sqrt{2}}$, and say what $\arctan(1)$ is."
    assert verify(gold, rf"\boxed{{{copy}}}").outcome == "correct"
    assert verify(gold, rf"\boxed{{{copy}}}", question=question).outcome == "wrong"
    assert verify(gold, rf"\boxed{{{gold}}}", question=question).outcome == "correct"
    assert verify(gold, rf"\boxed{{{copy} = {gold}}}", question=question).outcome == "correct"


@pytest.mark.parametrize(
    ("question", "gold", "copies", "solutions"),
    [
        ("Write $3x-y=2$ in slope-intercept form.", "y=3x-2", ("3x-y=2", "2=3x-y"), ("y=-2+3x", "3x-2")),
        ("Write 3x - y = 2 in slope-intercept form.", "y=3x-2", ("3x-y=2",), ("y=-2+3x", "3x-2", "3x-2=y")),
        ("Solve $-4x>8$.", "x<-2", ("-4x>8", "8<-4x"), ("-2>x", r"(-\infty,-2)")),
        (r"Solve $3x\ge 12$.", r"x\ge 4", (r"12\le 3x",), (r"4\le x", r"[4,\infty)")),
        ("Solve $5t-1=19$.", "t=4", ("5t-1=19", "19=5t-1", "5t-1-19=0", "5t=20"), ("4", "4=t", "t-4=0")),
    ],
)  # fmt: skip
def test_the_question_is_no_solution_of_it(
    question: str, gold: str, copies: tuple[str, ...], solutions: tuple[str, ...]
) -> None:
    assert [a for a in copies if verify(gold, rf"\boxed{{{a}}}", question=question).outcome == "correct"] == []
    assert [a for a in solutions if verify(gold, rf"\boxed{{{a}}}", question=question).outcome != "correct"] == []
