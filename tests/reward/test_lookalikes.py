"""Answers that look like the gold, by the rule that tells them apart: (gold, boxed answer) that match and that do not."""

# ruff: noqa: E501

from __future__ import annotations

import pytest

from megatron_t1.reward.answers.verify import verify

RIGHT = {
    "ratios": [("2:5", "10:25"), ("0:2:5", "0:4:10"), ("0:3", "0:6"), (r"1:\sqrt2", r"\sqrt2:2"), ("2a:3a", "2:3")],
    "pieces in relations": [
        ("|x|>2", r"x<-2\text{ or }x>2"), (r"\sqrt{x}+\sqrt{y}=1", r"2\sqrt{y}+2\sqrt{x}=2"), (r"\sqrt{x}\sqrt{y}=2", r"\sqrt{xy}=2"),
        ("y=|x-1|", "y-|1-x|=0"), (r"|z-i|=2", r"|i-z|=2"), (r"\ln x+\ln y=1", r"\ln y+\ln x-1=0"), (r"y\ge |x|", r"|x|-y\le 0"),
        ("3x+|k|=7", r"x=\frac{7-|k|}{3}"), (r"\lfloor x\rfloor=2", r"\lfloor x\rfloor-2=0"),
    ],
    "names of several values": [
        ("(4,9)", "y=9,x=4"), ("(4,9)", "(y,x)=(9,4)"), ("(4,9)", "n=4,a=9"), ("(4,9)", r"r=4,\theta=9"), ("(4,9)", "a=4,b=9"), ("(p,q)=(2,7)", "q=7,p=2"),
        ("(p,q)=(2,7)", "(q,p)=(7,2)"), ("p=2,q=7", "(p,q)=(2,7)"), ("r=1,s=2,t=3", "(r,s,t)=(1,2,3)"), ("(1,6),(2,5)", "y=6,x=1;y=5,x=2"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "y=2,x=1"), ("(5,6)", "x_2=6,x_1=5"), ("(5,6)", r"\beta=6,\alpha=5"), ("1,2", "y=2,x=1"), ("z=3,8", "z=8,3"),
        ("x=3,8", "x_1=3,x_2=8"), (r"\text{median}=3,\text{mode}=4", r"\text{mode}=4,\text{median}=3"), (r"\text{red}=3,\text{blue}=4", "3,4"),
    ],
    "and, or": [
        (r"a\land b", "b∧a"), (r"\neg q\land r", "r ∧ ¬q"), (r"a\land b", "a,b"), (r"x\ge 1\text{ and }y\ge 2", r"y\ge 2, x\ge 1"), (r"u=2\text{ or }v=3", r"v=3\text{ or }u=2"),
        (r"x=2\text{ or }x=7", r"x=2\text{ and }x=7"), (r"2\text{ and }7", r"2\text{ or }7"), ("x_1=2,x_2=7", r"x_1=2\text{ or }x_2=7"),
        (r"x=3\text{ or }3x-4y+7=0", "x=3, 3x-4y+7=0"), (r"y=x\text{ or }y=-x", "y=x,y=-x"), ("(1,2),(2,1)", r"x=1,y=2\text{ or }x=2,y=1"),
        (r"(1,3)\cup(5,8)", r"1<x<3\text{ or }5<x<8"), (r"(1,3)\cup(5,8)", "1<x<3, 5<x<8"), ("(2,3)", r"1<x<3\text{ and }2<x<8"), (r"(2,\infty)", r"x>1\text{ and }x>2"),
    ],
    "other names": [
        ("AB=7", "BA=7"), ("AB=7", "x=7"), ("AB=7", r"\overline{AB}=7"), ("AB=7", "AC=AB=7"), ("AB=7", "L=7"), ("x=7", "y=x=7"), ("y=7", "f(x)=7"),
        (r"\angle PQR=50^\circ", r"\angle RQP=50^\circ"), (r"\angle PQR=50^\circ", r"\angle Q=50^\circ"), (r"\angle P=50^\circ", r"P=50^\circ"),
        (r"\triangle ABC=6", r"\triangle BCA=6"), (r"\text{area}=9", r"\text{the area}=9"), (r"\text{area}=9", "A=9"), (r"\text{mean}=9", r"\text{average}=9"),
        (r"\text{speed}=9", r"\text{velocity}=9"), ("GCD=6", "HCF=6"), (r"\max=5,\min=2", r"\text{maximum}=5,\text{minimum}=2"),
    ],
    "equations for a value": [
        ("x=7", "x-7=0"), ("x=7", "7-x=0"), ("x=-4", "x+4=0"), (r"x=\frac32", r"x-\frac32=0"), ("y=3x-2", "3x-y=2"), ("xy=6", r"y=\frac6x"),
    ],
    "chains": [
        ("7", "ab+bc=7"), ("7", r"\sum_{n=1}^{\infty}\frac{7}{2^n}=7"), ("7", r"\lim_{x\to 0}\frac{\sin 7x}{x}=7"), ("7", "f(3)+g(2)=7"),
        ("10", r"\sum_{k=1}^{4}k=10"), ("7", r"\sum_{k=1}^{n}a_k=7"), ("6", r"\binom{n}{2}-\binom{m}{2}=6"), ("7", r"\int_0^7 1 dx=7"),
        ("0.4", r"P(A\cap B)=0.4"), ("4", "|a-b|=4"),
    ],
    "renamed constants": [
        ("x^3+c", "x^3+C"), ("x^3+C", "x^3+c"), (r"\frac{t^2}{2}+c", r"\frac{t^2}{2}+K"), (r"\frac{\pi}{6}+2k\pi", r"\frac{\pi}{6}+2n\pi"),
        (r"(-1)^k\frac{\pi}{6}+k\pi", r"(-1)^n\frac{\pi}{6}+n\pi"), (r"\frac{2}{(2k+1)\pi}", r"\frac{2}{(2n+1)\pi}"), (r"\sqrt{k\pi}", r"\sqrt{n\pi}"),
    ],
    "signs among words": [
        (r"\text{x-intercept}", "x intercept"), (r"\text{twenty-one}", "21"), (r"\text{right-angled}", r"\text{right angled}"), (r"\text{Yes!}", "yes"),
        ("k-4", r"\text{k-4}"), (r"\frac{p}{q}", r"\text{p/q}"), (r"\text{Ca}^{2+}", r"\mathrm{Ca^{2+}}"),
        (r"\text{Tom} < \text{Ann}", r"\text{Ann} > \text{Tom}"), ("circle", r"\text{a circle}"), ("2i+3", r"\text{3+2i}"), ("(y+2)(y-5)", r"\mathrm{(y-5)(y+2)}"),
        (r"\text{Tom}>\text{Ann}>\text{Lea}", r"\text{Lea}<\text{Ann}<\text{Tom}"), ("y=x^3-4", r"y=\text{x^3-4}"), (r"\text{Q and R}", r"\text{R and Q}"),
    ],
}  # fmt: skip

WRONG = {
    "ratios": [("2:5", "0:0"), ("2:0:5", "0:0:0"), ("0:2:5", "0:4:11"), ("0:2:5", "0:0:0"), ("0:3", "3:0"), ("4:7", r"t-t:\sin 0")],
    "pieces in relations": [
        ("|x+1|>2", "x+1>2"), (r"y=\sqrt{x^2+1}", r"|y|=\sqrt{x^2+1}"), ("x+2y=6", r"x+2\max(y,0)=6"), (r"y\ge x", r"y\ge |x|"),
        ("y=|x-1|", "y=x-1"), (r"x=\frac{7-k}{3}", "3|x|+k=7"), ("x=8", r"\lfloor x\rfloor=8"), ("|t|=9", "t=9"),
    ],
    "names of several values": [
        ("(4,9)", "y=4,x=9"), ("(4,9)", "(y,x)=(4,9)"), ("(4,9)", r"b=4\text{ and }a=9"), ("(p,q)=(2,7)", "q=2,p=7"), ("(p,q)=(2,7)", "(q,p)=(2,7)"),
        ("p=2,q=7", "(q,p)=(2,7)"), ("p=2,q=7", "(a,b)=(2,7)"), ("r=1,s=2,t=3", "(t,s,r)=(1,2,3)"), ("(1,6),(2,5)", "y=1,x=6;y=2,x=5"), ("(5,6)", "x_2=5,x_1=6"),
        ("z=3,8", "z=3,w=8"), (r"\text{median}=3,\text{mode}=4", r"\text{median}=3,\text{range}=4"), ("PQ=1,RS=2", "PQ=1,QR=2"), ("PQ=1,RS=2", "TU=1,VW=2"),
        (r"\text{red}=3,\text{blue}=4", r"\text{blue}=3,\text{green}=4"), ("(1,2),(3,4)", "(y,x)=(1,2),(y,x)=(3,4)"),
    ],
    "and, or": [
        (r"a\land b", r"a\lor b"), (r"\neg q\land r", r"\neg q\lor r"), (r"x\ge 1\text{ and }y\ge 2", r"x\ge 1\text{ or }y\ge 2"), (r"u=2\text{ or }v=3", "u=2,v=3"),
        (r"u=2\text{ or }v=3", "(2,3)"), ("u=2,v=3", r"u=2\text{ or }v=3"), ("(2,3)", r"x=2\text{ or }y=3"), (r"(1,3)\cup(5,8)", r"1<x<3\text{ and }5<x<8"),
        ("(1,8)", r"1<x<3\text{ and }2<x<8"), (r"(1,\infty)", r"x>1\text{ and }x>2"),
    ],
    "other names": [
        ("AB=7", "AC=7"), ("AB=7", r"\angle B=7"), ("AB=7", "B=7"), (r"\angle PQR=50^\circ", r"\angle QPR=50^\circ"), (r"\angle PQR=50^\circ", r"\angle P=50^\circ"),
        (r"\angle P=50^\circ", r"Q=50^\circ"), (r"\overrightarrow{AB}=(1,2)", r"\overrightarrow{BA}=(1,2)"), (r"\text{area}=9", r"\text{perimeter}=9"), ("GCD=6", "LCM=6"),
        ("x=7", r"\max(x,1)=7"), ("x=7", "f(x)=7"), (r"\text{maximum}=5", r"\text{minimum}=5"),
    ],
    "equations for a value": [
        ("x=7", "2x=14"), ("x=7", "2x-14=0"), ("x=7", "x-8=0"), ("x=7", "-2x+14=0"), ("x=7", r"\frac{x}{7}=1"), ("x=7", "x+1=8"), (r"x=\sqrt2", r"x\sqrt2=2"),
    ],
    "chains": [
        ("7", r"\frac{ab+7}{ab}-\frac{7}{ab}+5=7"), ("7", r"\sum_{k=1}^{4}k=7"), ("7", r"\prod_{k=1}^{3}k=7"), ("7", "f(2)-f(2)+3=7"),
        ("7", r"\int_0^1 x dx-\int_0^1 x dx=7"), ("2", r"\sin^2 u+\cos^2 v+\sin^2 v+\cos^2 u-1=2"),
    ],
    "renamed constants": [
        ("c+d", "K+d"), ("ab+c", "ab+C"), ("x^3+C", "x^3+A"), (r"\frac{(n-2)\pi}{n}", r"\frac{(k-2)\pi}{k}"), (r"\frac{\pi}{n}", r"\frac{\pi}{m}"),
        (r"n\pi(n+1)", r"k\pi(k+1)"),
    ],
    "signs among words": [
        ("m!", r"\text{m}"), ("k-4", r"\text{k+4}"), (r"\frac{p}{q}", r"\text{q/p}"), (r"\frac{p}{q}", r"\text{frac p q}"), ("p:q", r"\text{q:p}"), ("|y|", r"\text{y}"),
        (r"\text{Ca}^{2+}", r"\text{Ca}^{2-}"), (r"\text{Ca}^{2+}", r"\text{Ca}"), (r"\text{F}^-", r"\text{F}^+"), (r"\text{type O+}", r"\text{type O-}"), (r"\text{C}\#", r"\text{C}"),
        (r"\text{Tom} < \text{Ann}", r"\text{Tom} > \text{Ann}"), (r"\text{Tom} < \text{Ann}", r"\text{Tom Ann}"), (r"\text{false}", "¬false"), ("a b", r"\text{b}"),
        ("x-1", r"\text{x^-1}"), ("0", r"\text{0 or more}"), ("3+2i", r"\text{3-2i}"), ("(y+2)(y-5)", r"\text{(y-2)(y+5)}"), (r"7\text{ kg}", r"\text{7/kg}"),
        ("y=x^3-4", r"y=\text{x^3+4}"), ("2^n", r"\text{2n}"), ("-x", r"\text{x}"),
    ],
}  # fmt: skip


def _cases(by_rule: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(rule, *case) for rule, cases in by_rule.items() for case in cases]


@pytest.mark.parametrize(("rule", "gold", "answer"), _cases(RIGHT))
def test_right(rule: str, gold: str, answer: str) -> None:
    verdict = verify(gold, rf"\boxed{{{answer}}}")
    assert verdict.outcome == "correct", (rule, verdict)


@pytest.mark.parametrize(("rule", "gold", "answer"), _cases(WRONG))
def test_wrong(rule: str, gold: str, answer: str) -> None:
    verdict = verify(gold, rf"\boxed{{{answer}}}")
    assert verdict.outcome == "wrong", (rule, verdict)
