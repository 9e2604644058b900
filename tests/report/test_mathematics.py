"""Formulas of hostile texts: what is drawn is MathML of a list, all else is the text."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from megatron_t1.report.mathematics import _ELEMENTS, MAX_CHARS, with_formulas
from tests.forks import ROOT


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\frac{1}{2}$.", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        (r"\[x^2\]", "<msup><mi>x</mi><mn>2</mn></msup>"),
        (r"\(\sqrt{y}\)", "<msqrt>"),
        (r"$$\sum_{k=1}^n k$$", 'display="block"'),
        (r"\boxed{7}", "<menclose"),
        ("so $ x $ is", "<mi>x</mi>"),
    ],
)
def test_formulas_are_drawn(text: str, inside: str) -> None:
    assert inside in with_formulas(text)


@pytest.mark.parametrize(
    "text",
    [
        "it costs $5",
        "Tom has $5 and buys a toy for $3.",
        "US$5, then US $10 and $20",
        "<script>alert(1)</script>",
        "$" + "x" * (MAX_CHARS + 1) + "$",
        r"$\begin{matrix}$",
    ],
)
def test_what_is_no_formula_stays_text(text: str) -> None:
    assert str(with_formulas(text)) == str(escape(text))


def test_brackets_that_never_close_are_left_soon() -> None:
    """In the square of 60,000 characters it would not end within the test's time."""
    for opening in (r"\[", r"\(", "$", "$$", r"\boxed{"):
        with_formulas(opening * 30_000)


def test_no_text_gets_through() -> None:
    """Markup in every place of a formula comes out as text, or the formula does."""
    evil = '<img src=x onerror="alert(1)">'
    for text in (f"${evil}$", r"$\href{javascript:alert(1)}{x}$", rf"$\text{{{evil}}}$", rf"$\color{{{evil}}}{{x}}$",
                 rf"$\class{{{evil}}}{{x}}$",
                 rf"$\style{{{evil}}}{{x}}$", rf"$\unicode{{{evil}}}$", f"${'{' * 150}x{'}' * 150}$"):  # fmt: skip
        root = ElementTree.fromstring(f"<p>{with_formulas(text)}</p>")
        assert {element.tag for element in root.iter()} <= _ELEMENTS | {"p"}
        assert not any(name.startswith("on") or name in ("href", "style") for e in root.iter() for name in e.attrib)


def test_most_formulas_of_math500_are_read() -> None:
    """Real problems: 19 of 20 formulas of up to MAX_CHARS are drawn."""
    lines = (ROOT / "tests/data/grader/math500.jsonl").read_text().splitlines()[:150]
    texts = [json.loads(line)["problem"] for line in lines]
    drawn = sum(with_formulas(text).count("<math") for text in texts)
    left = sum(len(with_formulas(text).split("$")) // 2 for text in texts)
    assert drawn > 300
    assert drawn > 19 * left
