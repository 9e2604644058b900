"""Spellings of answers by kind: (gold, bare answer), and (response, chosen letter) with B as the right one."""

# ruff: noqa: E501

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_t1.reward.answers.verify import verify

RIGHT = [
    ("12", "12.0"), ("12", "+12"), ("1200", "1,200"), ("1200", "1 200"), ("1200", "1.2e3"),
    ("1200", r"1.2\times10^3"), ("1200", r"1.2 \cdot 10^{3}"), ("0.00012", "1.2e-4"),
    ("0.00012", r"1.2\times 10^{-4}"), ("3/4", "0.75"), ("0.75", r"\frac{3}{4}"), ("0.75", "3/4"),
    (r"\frac{3}{4}", "3/4"), (r"\frac34", r"\dfrac{3}{4}"), (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"\frac{6}{8}", r"\frac34"), (r"2\frac{1}{3}", r"\frac{7}{3}"), (r"\frac73", "2 1/3"), (r"2 \frac13", "7/3"),
    ("2.5", r"2\frac12"), ("2.5", "2½"), (r"\frac{1}{3}", r"0.\overline{3}"), (r"\frac13", "0.333..."),
    (r"0.\overline{3}", r"\frac{1}{3}"), (r"0.1\overline{6}", r"\frac16"), (r"0.\overline{142857}", "1/7"),
    (r"0.3\dot{3}", "1/3"), ("50%", "0.5"), ("50%", "50"), (r"50\%", "50 percent"), (r"12.5\%", "12.5"),
    ("0.25", "25%"), (r"\frac14", r"25\%"), (r"33\frac{1}{3}\%", r"\frac13"), ("5 cm", "5"), ("5", "5 cm"),
    (r"5\text{ cm}", "5 centimeters"), (r"5 \mathrm{~cm}", r"5\,\text{cm}"), (r"5\mathrm{cm}^2", r"5 \text{ cm}^2"),
    (r"5\text{ cm}^2", "5"), ("5 square units", "5"), (r"\$5", r"5 \text{ dollars}"), ("5 dollars", "$5"),
    ("120", "120 km/h"), ("60 mph", "60"), ("3 hours", "3"), ("2:30", "2:30"), ("2:30 PM", r"2{:}30 \text{ p.m.}"),
    (r"45^\circ", "45"), (r"45^\circ", "45 degrees"), (r"\frac{\pi}{4}", r"45^\circ"),
    (r"45^\circ", r"\frac{\pi}{4}\text{ radians}"), (r"\frac{\pi}{3}", r"\pi/3"), ("1010_2", "1010_{2}"),
    ("1010_2", r"1010_{\text{two}}"), ("(1010)_2", "1010_2"), ("4F_{16}", "4F_{16}"), (r"\{1,2,3\}", "{3,2,1}"),
    (r"\{1,2,3\}", "1,2,3"), ("1, 2, 3", "3, 1 and 2"), ("1,2", r"1\text{ and }2"), ("x=1,2", "x=2 or x=1"),
    ("1,2", r"x=1 \text{ or } x=2"), ("1,2", "x_1 = 1, x_2 = 2"), (r"x = 3 \text{ or } x = -1", "-1, 3"),
    (r"\pm 3", "3, -3"), (r"\pm 3", "-3,3"), (r"x=\pm 3", "3,-3"), (r"1\pm\sqrt2", r"1+\sqrt{2},1-\sqrt{2}"),
    (r"\pm 2\sqrt3", r"\{-2\sqrt3,2\sqrt3\}"), ("(1,2)", r"\left(1,2\right)"), ("(1,2)", "(1, 2.0)"),
    (r"(\frac12,3)", "(0.5,3)"), ("(1,2,3)", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), (r"(3,\frac{\pi}{2})", r"\left(3, \pi/2\right)"),
    ("(1,2),(3,4)", "(3,4) and (1,2)"), ("(1,2)", "x=1, y=2"), ("(1,2)", r"x=1 \text{ and } y=2"),
    ("(3,-1)", "a = 3, b = -1"), ("x=1,y=2", "(1,2)"), ("x=1,y=2", "y=2, x=1"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"),
    (r"\begin{pmatrix} 1/2 & 0 \end{pmatrix}", r"\begin{pmatrix} 0.5 & 0 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "[[1,2],[3,4]]"), ("[1,2]", r"1\le x\le 2"),
    ("(1,2]", r"1<x\leq 2"), ("x>2", r"(2,\infty)"), (r"(2,\infty)", "x > 2"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, +\infty)"), (r"(-\infty,2)\cup(3,\infty)", "x<2 or x>3"),
    (r"x\ge 2", r"2\le x"), (r"[0,\infty)", r"x\geq 0"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)"), (r"(-\infty,2)\cup(2,\infty)", r"x\ne 2"),
    (r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)"),
    (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R} \setminus \{2\}"), (r"\mathbb{R}\setminus\{2\}", r"x \neq 2"),
    ("(0,1)", r"\{x\mid 0<x<1\}"), ("0<x<1", r"x\in(0,1)"), (r"-1 \le x \le 1", r"|x|\le 1"), ("|x|<2", "(-2,2)"),
    ("[-1,1]", "-1 ≤ x ≤ 1"), (r"a \geq 3", r"[3,+\infty)"), ("k<5", r"(-\infty, 5)"), ("[2,5)", r"2 \le t < 5"),
    ("x^2+2x+1", "(x+1)^2"), ("(x+1)(x-1)", "x^2-1"), ("2(x+1)", "2x+2"), (r"\frac{x}{2}", "0.5x"),
    (r"\frac{x+1}{2}", r"\frac12 x+\frac12"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    (r"\sqrt{12}", r"2\sqrt{3}"), (r"3\sqrt{2}", "3√2"), (r"\sqrt{2}", "sqrt(2)"), (r"\sqrt[3]{2}", "2^{1/3}"),
    ("2^{10}", "1024"), ("1024", "2^10"), (r"\ln 8", r"3\ln 2"), (r"\log_2 8", "3"), ("e^{2}", "e^2"),
    (r"\frac{\pi}{2}", r"0.5\pi"), (r"2\pi", "2π"), (r"\sin^2 x", r"1-\cos^2 x"), (r"\frac{1}{1+x}", "(1+x)^{-1}"),
    ("x^{-1}", r"\frac1x"), ("5!", "120"), (r"\binom{5}{2}", "10"), ("10", "C(5,2)"), ("3+4i", "4i+3"),
    ("i", r"\sqrt{-1}"), ("-i", r"\frac{1}{i}"), ("a^2+b^2", "b^2+a^2"), ("xy", "yx"), ("xy", "x*y"),
    ("6xy", r"6\cdot x\cdot y"), (r"\frac{a}{b}", "a/b"), ("2n+1", "2n + 1"), (r"2k\pi", r"2\pi k"),
    (r"\frac{4}{3}\pi r^3", r"\frac{4\pi r^3}{3}"), (r"12\pi", r"12\pi \text{ cm}^3"), ("y=2x+1", "2x+1"),
    ("y=2x+1", "y = 1 + 2x"), ("y=2x+1", "2x-y+1=0"), ("x^2+y^2=4", "x^2 + y^2 - 4 = 0"), ("2x+3y=6", "4x+6y=12"),
    ("f(x)=2x", "2x"), ("f(x)=2x", "f(x) = 2 x"), ("5", "x=5"), ("x=5", "5"), ("a_n=2n-1", "2n-1"), ("S=12", "12"),
    ("12", "S = 12"), ("12", "A = 12 cm^2"), ("12", "The answer is 12"), ("12", r"\text{12}"),
    ("12", r"\mathbf{12}"), ("12", "**12**"), ("12", "$12$"), ("12", "12."), ("12", r"\boxed{12}"),
    (r"\frac{x^2}{4}+y^2=1", "x^2+4y^2=4"), ("25", "x+y = 25"), ("6", "n = 6"), ("n=6", r"\text{n}=6"),
    ("17", "17 students"), ("17", r"17\text{ students}"), ("Yes", "yes"), ("Yes", r"\text{Yes}"), ("yes", "Yes."),
    ("no", "No"), ("True", "true"), ("Monday", "monday"), (r"\text{Saturday}", "Saturday"), ("Alice", "alice"),
    ("circle", r"\text{Circle}"), (r"\text{even}", "even"), ("no solution", r"\text{No solution}"),
    ("no solution", r"\emptyset"), (r"\emptyset", "∅"), ("infinitely many", r"\text{infinitely many}"),
    ("isosceles triangle", r"\text{isosceles triangle}"), ("the first", "first"),
    ("all real numbers", r"\mathbb{R}"), (r"\infty", "infinity"), ("DNE", r"\text{DNE}"),
    ("undefined", r"\text{undefined}"), ("Friday", r"\textbf{Friday}"), ("3:4", "3 : 4"), ("3:4", "3/4"),
    ("3:4", "3 to 4"), ("1:2:3", "1 : 2 : 3"), (r"2^3 \cdot 3", r"2^3\times 3"), (r"\frac{1}{2}", r"1 \div 2"),
    ("1/2", ".5"), ("0.5", ".50"), ("-0.5", "-.5"), ("7", r"7 \text{ (units)}"), ("x^2", "x^{2}"), ("x_1", "x_{1}"),
    (r"\triangle ABC", r"\triangle{ABC}"), ("AB", "AB"), ("10^{-3}", "0.001"), (r"6.02 \times 10^{23}", "6.02e23"),
    ("1{,}000", "1000"), (r"1\,000", "1000"), ("1000", "1000.00"), ("$32,348", "32348"), ("18", r"\$18"),
    ("18", "$18.00"), ("18", "18 dollars"), ("64", "64 square inches"), ("1/6", r"\frac{1}{6} \approx 0.167"),
    (r"\frac{1}{6}", "0.1667"), ("2.236", r"\sqrt{5}"), ("8", "2^3 = 8"), ("8", "= 8"), ("8", r"\approx 8"),
    ("8", r"x \approx 8"), ("-1/2", r"-\frac{1}{2}"), (r"\frac{-1}{2}", "-0.5"), ("11/2", "5.5"), ("5", "5/1"),
    ("a", "a"), ("a+b", "b+a"), ("-x+1", "1-x"), (r"\frac{2}{\sqrt{3}}", r"\frac{2\sqrt{3}}{3}"),
    (r"\tan^{-1}(2)", r"\arctan 2"), (r"\cos\frac{\pi}{3}", "1/2"),
    (r"\left\lfloor \frac{n}{2}\right\rfloor", r"\lfloor n/2 \rfloor"), ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"\frac{n!}{k!(n-k)!}", r"\binom{n}{k}"), (r"x\in\{1,2\}", "1,2"), ("1 < x < 2", r"x \in (1, 2)"),
    (r"p \le q", r"q \ge p"), ("(x-1)^2+(y+2)^2=9", "x^2-2x+y^2+4y-4=0"),
    (r"\frac{\pi}{6}+k\pi", r"k\pi+\frac{\pi}{6}"),
    (r"\frac{\pi}{6}+k\pi, k\in\mathbb{Z}", r"\frac{\pi}{6}+n\pi, n \in \mathbb Z"), (r"\vec{v}=(1,2)", "(1,2)"),
    (r"\langle 1,2\rangle", "(1,2)"), (r"1:\sqrt{3}", r"\frac{1}{\sqrt{3}}"), ("12", "12"), ("1.5 hours", "1.5"),
    (r"4\sqrt{2}\text{ units}", r"4\sqrt{2}"),
    (r"x=\frac{-b\pm\sqrt{b^2-4ac}}{2a}", r"\frac{-b\pm\sqrt{b^2-4ac}}{2a}"), ("(-1)^n", "(-1)^{n}"),
    (r"\left(\frac{1}{2}\right)^n", "2^{-n}"), ("4,-4", r"\pm4"), ("2, -2, 3", r"\pm 2, 3"),
    (r"\frac{3\pi}{4}", r"135^{\circ}"), (r"2\sqrt{3}+4", r"4+\sqrt{12}"),
]  # fmt: skip

WRONG = [
    ("12", "21"), ("12", "12.5"), ("12", "-12"), ("12", "12, 13"), ("12", "12 or 13"), ("12", "1, 2"), ("12", "12x"),
    ("12", "12!"), ("12", r"\sqrt{12}"), ("12", "12^2"), ("12", "12%"), ("0.12", "12"), ("12", "{12, 13}"),
    ("12", "x>12"), ("12", r"\ne 12"), ("12", "not 12"), ("12", "5=12"), ("12", "12=13"), ("12", "about 12 or 13"),
    ("1/2", "2"), ("1/2", "1/3"), ("1/2", "0.51"), ("1/3", "0.3"), ("1/3", "0.34"), ("0.333", "0.34"),
    ("1/7", "0.14"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "1,2,3"), ("[1,2]", "(1,2)"),
    ("[1,2]", "1<x<2"), ("(1,2)", "{2,1}"), ("x=1,y=2", "(2,1)"), ("x=1,y=2", "x=2,y=1"), ("{1,2}", "{1,2,3}"),
    ("{1,2}", "{1}"), ("1,2", "1"), ("1,2", "1,2,2,3"), ("(1,2),(3,4)", "(1,3),(2,4)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"), ("x+1", "x-1"),
    ("x^2", "2x"), ("x+y", "x-y"), ("sin x", "cos x"), (r"\ln x", r"\log_2 x"), ("2x+1", "2y+1"), ("y=2x", "x=2y"),
    ("y=2x", "y=2x+1"), ("y=2x", "y<2x"), ("f(x)=x", "f(x)=x^2"), ("x^2+y^2=4", "x^2+y^2=2"), ("x>2", "x<2"),
    ("x>2", r"x\ge2"), ("x>2", "y>2"), ("x<1 or x>2", "1<x<2"), (r"(2,\infty)", r"[2,\infty)"),
    (r"(-\infty,2)", r"(2,\infty)"), (r"x\ne 2", "x=2"), (r"\mathbb{R}", r"\mathbb{Z}"), ("5 cm", "5 m"),
    ("5 cm", "5 cm^2"), ("5 km/h", "5 m/s"), ("5 hours", "5 minutes"), ("50%", "5%"), ("50%", "0.05"), ("5", "5%"),
    (r"45^\circ", r"\frac{\pi}{3}"), (r"45^\circ", "0.45"), ("1010_2", "1010_3"), ("1010_2", "1010"),
    ("1010_2", "10"), ("yes", "no"), ("yes", "yes and no"), ("yes", "not yes"), ("Monday", "Tuesday"),
    ("even", "odd"), ("even", "not even"), ("Alice", "Bob"), ("Alice", "Alice and Bob"), ("Alice", "Alice or Bob"),
    ("circle", "ellipse"), ("no solution", "0"), ("ABC", "CBA"), ("AB", "BA"), ("3:4", "4:3"), ("2:30", "2:31"),
    ("2:30 PM", "2:30 AM"), ("1.5e3", "1.5e4"), ("0", "10^{-9}"), ("0", "1/1000000"), ("10^{-9}", "0"), ("i", "-i"),
    ("3+4i", "3-4i"), ("a", "b"), ("a", "A"), ("x_1", "x_2"), ("n", "n+1"), ("2n+1", "2n-1"), ("5!", "5"),
    (r"\pi", "3.14"), (r"\pi", "22/7"), (r"\sqrt2", "1.41"), ("7", "seven or eight"), ("7", "7 and 8"),
    ("7", r"7\text{ or }8"), ("7", r"\{7\}\cup\{8\}"), ("7", r"\boxed{7} \boxed{8}"), ("7", "7;8"), ("7", "7/8"),
    ("-7", "7"), ("7", r"\pm7"), ("7", "|7-14|-14"), ("2^{100}", "2^{100}+1"), (r"k\pi", r"k\pi+1"), ("4", "4,4,5"),
    ("4", "four and five"), ("4", "x=4,y=5"), ("4", "x=4 or x=5"), ("4", "y=4x"), ("x=4", "y=4"), ("4", "4=4=5"),
    ("4", "f(x)=4x"), ("4", "3<4"), ("4", "4<5"), ("4", r"4\to5"), ("4", "4?"), ("4", "maybe 4"),
    ("4", "4 or something else"), ("4", "I think 4 but could be 5"),
]  # fmt: skip

CLAUSES_RIGHT = [
    (r"m\pi", r"m\pi, m\in\mathbb{Z}"), (r"3n, n\in\mathbb{N}", r"3m\ (m\in\mathbb{Z}^+)"),
    (r"3n, n\in\mathbb{N}", r"3n, n \ge 1"), (r"5^{n}", r"5^n \text{ for } n=0,1,2,\dots"),
    (r"2R", r"2R \text{ where } R \text{ is the circumradius of the triangle}"), ("23", r"23,\text{ not }32"),
    (r"ax+b, a,b\in\mathbb{R}", r"ax+b\text{ where }a\text{ and }b\text{ are real numbers}"),
    (r"\frac{\pi}{5}+4\pi n, n\in\mathbb{Z}", r"4k\pi+\frac{\pi}{5},\ k\in\mathbb{Z}"), (r"\sqrt{5} t, t\in\mathbb{R}", r"t\sqrt5 \ (t\in\mathbb{R})"),
    (r"3 \cdot k, k\in\mathbb{Z}", r"3k, k\in\mathbb Z"), (r"5\pi m n, m, n\in\mathbb{Z}", r"5mn\pi, m,n\in\mathbb{Z}"), (r"\pi k, k\in\mathbb{Z}", r"k \pi"),
    (r"2+7t, t\in\mathbb{Z}", r"\{2+7s: s\in\mathbb{Z}\}"), (r"2+7t, t\in\mathbb{Z}", "2+7k, where k is any integer"),
    (r"\{1,2,3\}", r"\{n\in\mathbb{Z}\mid 0<n<4\}"), ("4", r"4\text{ for each child}"),
    (r"\{2+7t\mid t\in\mathbb{Z}\}", r"x=\{2+7s\mid s\in\mathbb{Z}\}"), (r"\{5k\mid k\in\mathbb{Z}\}", r"\text{The set is }\{5k: k\in\mathbb{Z}\}"),
    (r"\{x\mid x<1\text{ or }x>4\}", r"x=\{x\mid x<1\text{ or }x>4\}"),
    (r"x=\frac{\pi}{5}+2m\pi, m\in\mathbb{Z}", r"\left\{\frac{\pi}{5}+2m\pi : m\in\mathbb{Z}\right\}"),
    ("f(x)=3x", r"f(x)=3x\text{ for all real numbers}"), ("f(x)=3x", r"f(x)=3x\text{ for all }x\in[0,1]"),
    (r"f(x)=\frac2x", r"f(x)=\frac2x\text{ for all }x\ne 0"), (r"5k", r"5k\text{ with }k\in\mathbb{Z}"),
    (r"\sin x+C", r"\sin x+C,\text{ where }C\text{ is a constant of integration}"),
    (r"c_1e^x+c_2e^{2x}", r"c_1e^x+c_2e^{2x},\text{ where }c_1\text{ and }c_2\text{ are arbitrary constants}"),
]  # fmt: skip
CLAUSES_WRONG = [
    (r"3n, n\in\mathbb{N}_0", r"3n, n\in\mathbb{Z}^+"), (r"3n, n\in\mathbb{N}", r"3n, n \ge 4"),
    (r"2+7t, t\in\mathbb{Z}", r"\{2+7s: s\in\mathbb{R}\}"), (r"6n", r"6n \text{ for every odd } n"),
    (r"Ce^{2x}, C\in\mathbb{R}", r"Ce^{2x}\text{ for some constant }C>0"), ("23", "23, not sure"),
    (r"ax+b, a,b\in\mathbb{R}", r"ax+b\text{ where }a\text{ and }b\text{ are integers}"),
    ("9", r"9\text{ for any }n\text{ other than }3"), ("9", r"9\text{ for each, }8\text{ for the last}"),
    ("9", r"n=9,\text{ where }n\text{ may be }8"), ("2R", r"2R\text{ where }R\text{ is not the circumradius}"),
    (r"x>1, x\ge 0", "x>1, x<5"), (r"y=x^2, x\ge 0", "y=x^2"), (r"5k", r"5k,\text{ where }k\text{ is an odd integer}"),
    (r"3x, x\in[0,1]", r"3x\text{ for all }x\in[0,2]"), ("5", r"5\text{ for some values}"), ("5", "5 with 6"),
    (r"k\pi, k\in\mathbb{Z}", r"k\pi\text{ with }k\in\mathbb{N}"), (r"x=5\text{ with }y=6", "x=5"),
]  # fmt: skip

SCALED_RIGHT = [
    (r"\frac74", "7 fourths"), (r"\frac{3}{16}", "three sixteenths"), ("300000", "3 lakh"), ("70000000", "7 crore"),
    ("0.0007", r"7\text{ basis points}"), ("0.000007", r"7\text{ ppm}"), ("0.1", "1 tenth"), ("7", "7 grand pianos"), ("7", "7 impossible outcomes"), ("7", "7 fifth graders"),
    ("7", "7 red"), ("7", r"7\text{ shaded squares}"), ("7", r"7\text{ paths}"), ("5mn", r"5\cdot m\cdot n"),
]  # fmt: skip
SCALED_WRONG = [
    ("7", "7 fourths"), ("7", "7 sextillion"), ("7", "7 grand"), ("7", "7 impossible"), ("7", "7 ninetieths"), ("7", r"7\text{ tripled}"), ("7", "7 tenfold"),
    ("7", "7 nope"), ("7", r"7\text{ per thousand}"), ("7", r"7\text{ bn}"), ("1", "1 fifteenth"), ("1", "1 half"),
]  # fmt: skip
UNITS_RIGHT = [
    (r"12\text{ N}", r"12\,\mathrm{N}"), (r"12\,\mathrm{N}", "12"), (r"12\,\mathrm{N}", r"0.012\,\mathrm{kN}"), (r"9\text{ volts}", r"9\ \mathrm{V}"),
    (r"300\text{ kelvin}", r"300~\mathrm{K}"), (r"2\times 10^{-6}\text{ coulombs}", r"2\times10^{-6}\,\mathrm{C}"), ("£15", "15£"), ("15", r"15\,\text{€}"),
    (r"20^\circ\text{C}", r"20\text{ C}"), (r"20\text{ C}", r"20000\text{ mC}"), (r"4\text{ H}", "4000 mH"),
    (r"4\text{ pints}", "2 quarts"), (r"3\text{ cups}", "1.5 pints"), (r"1\text{ kB}", "1000 bytes"), ("5kn", "5nk"),
    (r"77^\circ\text{F}", r"77\text{ degrees Fahrenheit}"), (r"2\text{ torr}", r"2\text{ mmHg}"), ("3qt", "3tq"),
    (r"7\text{ m/s}", r"7 \frac{\text{m}}{\text{s}}"), (r"7\text{ W}", r"7\frac{\text{J}}{\mathrm{s}}"),
    (r"3\text{ mol/L}", r"3000\text{ mM}"), (r"9\text{ V/m}", r"9\text{ newtons per coulomb}"),
    (r"4\times10^{-6}\text{ F}", r"4\ \mu\text{F}"), (r"8/\text{s}", r"8\text{ Hz}"), ("12", r"12\text{ pts}"),
]  # fmt: skip
UNITS_WRONG = [
    (r"12\,\mathrm{N}", r"12\,\mathrm{J}"), (r"12\,\mathrm{N}", r"12\,\mathrm{kN}"), ("12N", r"12\,\mathrm{N}"), ("£15", "15€"), ("5C", r"5\,\mathrm{C}+1"),
    (r"20\text{ C}", r"20^\circ\text{C}"), (r"3\text{ F}", r"3^\circ\text{F}"), (r"1\text{ kB}", "1000 bits"),
    (r"4\text{ pints}", "4 quarts"), (r"3\text{ C}", r"3\text{ F}"), (r"2\text{ H}", r"2\text{ h}"),
    (r"20^\circ\text{C}", r"68^\circ\text{F}"), (r"7\text{ m/s}", r"7 \frac{\text{s}}{\text{m}}"),
]  # fmt: skip

ABOUT_RIGHT = [
    (r"\sqrt{7}", r"\sqrt{7}\text{ (about 2.65)}"), (r"\sqrt{7}", r"x=\sqrt{7}\approx 2.65\approx 3"), ("298", r"298\approx 300"),
    (r"\frac{3}{7}", r"\frac37 \approx 42.86\%"), (r"\arctan 2", r"\arctan 2\approx 63.4^\circ"), ("x^2", r"x^2\approx 4"),
    (r"7\text{ m}", r"7\text{ m}\approx 23\text{ ft}"), ("12", "12 (approximately twelve)"), ("1,2", "1, 2 (about 3)"),
    ("5", r"\text{The area of the square is }5"), ("5", r"\text{remainder: }5"), ("5", r"\text{The opposite side is }5"),
    (r"\text{reciprocal}=5", r"\text{the reciprocal is }5"), ("5", r"\text{the sum of the squares is }5"),
]  # fmt: skip
ABOUT_WRONG = [
    ("63", r"63\approx 62"), (r"\sqrt{50}", r"\sqrt{50}\text{ (roughly 9)}"), (r"\frac{3}{7}", r"\frac37 \approx 530\%"),
    (r"7\text{ m}", r"7\text{ m}\approx 40\text{ ft}"), ("298", "298 (about 297)"), (r"e^3", r"n=e^3\approx 30"),
    ("8", r"\text{The cube of the answer is }8"), ("8", r"\text{Its negation: }8"), ("8", r"\text{its cube}=8"),
    ("8", r"\text{the additive inverse is }8"),
]  # fmt: skip

JOINED_RIGHT = [
    (r"7\text{ cats and }9\text{ dogs}", r"9\text{ dogs},7\text{ cats}"), (r"7\text{ cats and }9\text{ dogs}", "7, 9"),
    (r"7\text{ cats, }9\text{ dogs}", r"\text{9 dogs and 7 cats}"), (r"17\text{ R }3", "17 r 3"), ("2/9", r"\text{The chance is }2\text{ in }9."), (r"6\text{ by }4", r"6\text{ by } 4"),
    (r"17\text{ R }3", r"17\text{ with a remainder of }3"), (r"\frac{3}{8}", "3 out of 8"), (r"\frac{3}{8}", r"3\text{ in }8"),
    ("135 minutes", r"\text{2 hours and 15 minutes}"), (r"5\text{ cm or }6\text{ cm}", "6 cm or 5 cm"),
    (r"x=5\text{ cm and }y=6\text{ cm}", "x=5, y=6"), (r"\text{July 4, }1776", "4 July 1776"), ("12", r"\text{Therefore, }x=12"),
]  # fmt: skip
JOINED_WRONG = [
    (r"7\text{ cats and }9\text{ dogs}", r"9\text{ cats and }7\text{ dogs}"), (r"7\text{ cats and }9\text{ dogs}", "9, 7"),
    (r"6\text{ cm by }4\text{ cm}", r"8\text{ cm by }3\text{ cm}"), (r"17\text{ R }3", "51 R 1"), (r"17\text{ R }3", "51R"),
    (r"17\text{ R }3", "3 R 17"), (r"9\text{ N at }40^\circ", r"40\text{ N at }9^\circ"), (r"\frac{3}{8}", "8 out of 3"),
    ("24", r"8\text{ of the }3"), (r"9\text{ less than }4", r"4\text{ less than }9"),
]  # fmt: skip

FORMULAS_RIGHT = [
    (r"\mathrm{CO_2}", "CO2"), (r"\mathrm{CO_2}", r"\ce{CO2}"), (r"\text{Ca}^{2+}", r"\ce{Ca^2+}"),
    (r"NH_4^+", r"\mathrm{NH_4^{+}}"), (r"\mathrm{Ca(OH)_2}", r"\text{Ca}(\text{OH})_2"), (r"[Ar]4s^23d^6", r"[Ar] 4s^2 3d^6"),
    (r"2Na+Cl_2\to 2NaCl", r"\ce{2Na + Cl2 -> 2NaCl}"), (r"^{14}_{6}\text{C}", r"{}_{6}^{14}\mathrm{C}"),
    ("pH=3.2", "3.2"), ("pOH=3.2", r"\text{pOH}=3.2"), (r"f^{-1}(x)=\frac{x+5}{3}", r"\frac{x+5}{3}"),
    (r"f^{-1}(x)=\frac{x+5}{3}", r"f^{-1}(t)=\frac{t+5}{3}"), (r"\frac{dy}{dx}=3x^2", "y'=3x^2"), (r"\frac{dr}{dt}=2", "2"),
    (r"\frac{\partial u}{\partial t}=6xt", r"u_t=6xt"), (r"\frac{dV}{dr}=4\pi r^2", r"dV/dr = 4\pi r^2"),
]  # fmt: skip
FORMULAS_WRONG = [
    (r"\mathrm{CO_2}", "CO"), (r"\text{Ca}^{2+}", "Ca^{+}"), (r"NH_4^+", r"\mathrm{NH_3}"), (r"1s^22s^22p^3", r"1s^2 2s^2 2p^5"),
    (r"2Na+Cl_2\to 2NaCl", r"\ce{Na + Cl2 -> 2NaCl}"), (r"^{14}_{6}\text{C}", r"{}_{7}^{14}\mathrm{C}"), ("AB", "A_B"),
    ("A_{12}", "A_1 2"), ("pH=3.2", "pOH=3.2"), ("pH=3.2", "3.3"), (r"f^{-1}(x)=\frac{x+5}{3}", r"f(x)=\frac{x+5}{3}"),
    (r"\frac{dy}{dx}=\frac{x}{y}", r"\frac{dx}{dy}=\frac{x}{y}"), (r"\frac{dy}{dx}=\frac{x}{y}", r"\frac{dy}{dx}=-\frac{x}{y}"),
    (r"\frac{\partial u}{\partial t}=6xt", r"\frac{\partial u}{\partial x}=6xt"), (r"\frac{dr}{dt}=2", r"\frac{dV}{dt}=2"),
]  # fmt: skip

NOTATIONS_RIGHT = [
    ("1234567", "1'234'567"), ("1234567", "1.234.567"), ("7.5%", "7,5 %"), ("20%", "20 per cent"), ("4.2e-7", "4.2*10**-7"),
    ("4.2e-7", r"4.2\mathrm{E}{-7}"), ("7/30", "0.2(3)"), (r"\frac{3}{11}", r"0.\dot{2}\dot{7}"), ("-12", r"\text{minus twelve}"),
    ("-12", r"\text{negative }12"), ("56", "8C3"), (r"\binom{8}{3}", r"^{8}C_{3}"), (r"|2x-1|", r"\operatorname{abs}(2x-1)"),
    (r"\frac{5}{8}", r"\nicefrac{5}{8}"), (r"40^\circ", r"40^\degree"), (r"40^\circ", "40&deg;"), (r"40^\circ", "40˚"), (r"x\ge 4", "x&ge;4"),
    (r"x\ne 5", r"x\not=5"), (r"(-\infty,\infty)", r"t\in\mathbb{R}"), (r"\emptyset", r"\text{the empty set}"),
    (r"\emptyset", "This equation has no real solutions"), (r"\text{DNE}", r"\text{the limit doesn't exist}"),
    (r"\text{converges}", r"\text{the integral is convergent}"), (r"\text{diverges}", r"\text{It diverges}"),
    ("(a) 4 (b) 9", "a) 4, b) 9"), ("(a) 4 (b) 9", "(A) 4 (B) 9"), (r"[1,2]\cup\{6\}", r"1\le x\le 2\text{ or }x=6"),
    (r"x<1\text{ or }x=3", r"\left(x<1\text{ or }x=3\right)"), (r"x<1\text{ or }x=3", r"(-\infty,1)\cup\{3\}"),
    ("17", "La risposta è 17."), ("17", "Die Antwort ist 17."), ("17", "La respuesta es: 17"), ("17", "答えは17です"),
]  # fmt: skip
NOTATIONS_WRONG = [
    ("1234", "1.234"), ("1234567", "1.234.56"), ("750%", "7,5 %"), ("3/10", "0.2(3)"), ("12", r"\text{minus twelve}"), ("3", "2C3"),
    ("2x-1", r"\operatorname{abs}(2x-1)"), ("x=5", r"x\not=5"), (r"\mathbb{R}", r"x \in \mathbb{Z}"), (r"\emptyset", r"\{\emptyset\}"),
    (r"\text{converges}", r"\text{the integral is divergent}"), (r"\text{converges}", r"\text{the series converges absolutely}"),
    ("(a) 4 (b) 9", "a) 9, b) 4"), ("4", "a) 4, b) 9"), (r"[1,2]\cup\{6\}", r"1\le x\le 2\text{ and }x=6"),
    (r"[1,2]\cup\{6\}", r"1\le x\le 2\text{ or }y=6"), ("17", "Ответ: 18"),
]  # fmt: skip

OPTIONS = ("Paris", "London", "Berlin", "Rome")
LETTERS = [
    ("The answer is (B).", "B"), ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) London", "B"), ("Answer: B", "B"),
    ("**B**", "B"), (r"\boxed{B}", "B"), (r"\boxed{\text{B}}", "B"), (r"\boxed{(B)}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"), (r"\boxed{B. London}", "B"), (r"\boxed{B) London}", "B"),
    (r"\boxed{\text{(B) London}}", "B"), (r"\boxed{London}", "B"), (r"\boxed{b}", "B"),
    ("So the correct option is B.", "B"), ("The correct choice is B, because A is wrong.", "B"),
    ("I choose B.", "B"), ("Option B is correct.", "B"), ("B is correct.", "B"), ("B is the correct answer.", "B"),
    ("The answer is option B: London.", "B"), ("Therefore, B.", "B"), ("Final answer: B", "B"),
    ("Final Answer: (B) London", "B"), ("The best answer is B", "B"), ("Correct answer: $B$", "B"), ("答案是B", "B"),
    ("答案：B", "B"), ("选B", "B"), ("故选：B。", "B"), ("La réponse est B.", "B"), ("The answer is therefore (B)", "B"),
    ("The answer would be B", "B"), ("My answer: B", "B"), ("Hence the correct answer is **(B) London**.", "B"),
    (r"Thus the answer is $\mathbf{B}$", "B"),
    ("Let me think. A is wrong as ... C is wrong. D is wrong. So the answer must be B.", "B"),
    ("First I thought the answer is A. But after checking, the answer is B.", "B"),
    ("<think>maybe A</think>\nThe answer is B", "B"), ("Answer:\n\nB", "B"), ("Answer:\n**B**", "B"),
    ("The answer is:\n\\[ \\boxed{B} \\]", "B"), ("London", "B"), ("The answer is London.", "B"),
    ("It's London", "B"), ("ANSWER: B", "B"), ("Answer is B", "B"), ("[B]", "B"), ("{B}", "B"),
    ("The correct answer is option (B).", "B"), ("Choice B", "B"), ("A or B", None), ("A and B", None),
    ("A, B", None), ("either A or B", None), ("The answer is A or B", None), ("The answer is (A) or (B).", None),
    ("not B", None), ("The answer is not B", None), ("B is not correct", None), ("B is wrong", None),
    ("B is incorrect.", None), ("It isn't B", None), (r"\boxed{A,B}", None), (r"\boxed{A \text{ or } B}", None),
    (r"\boxed{B?} or \boxed{A}", None), ("Possibly B or C", None), ("The answer could be B or maybe C.", None),
    ("All of the above", None), ("None of them", None), ("I don't know", None), ("", None), ("ABCD", None),
    ("A B C D", None), ("A) Paris B) London C) Berlin D) Rome", None), ("The answer is B/C", None),
    ("The answer is B & C", None), ("Both B and C are correct", None),
    ("The answer is A. The answer is B or C.", None), ("<think>The answer is B", None), ("The answer is E", "E"),
    ("It can't be B", None), ("I would rule out B", None), ("Answer: B or C", None), (r"\boxed{}", None),
    ("The answer is neither A nor B.", None), ("B, but it could be C", None), ("Anything but B", None),
    ("The answer isn't B.", None), ("I think B or C, but the answer is B.", "B"),
    ("Answer: B; D", None), ("The answer is B, or rather D.", None), ("The answer is B; otherwise D.", None),
    ("Answer: $\\mathrm{B}$ / $\\mathrm{D}$", None), ("(B) (D)", None), ("The answer is B? Wait, D.", None),
    ("Answer: B\nor D", None), ("The answer is B | D", None), ("Answer: B – D", None), ("Answer: B, unless D", None),
    ("Answer: B if not D", None), ("Answer: \"B\" or maybe \"D\"", None), ("The answer is A? No, B.", None),
    ("The answer is B because point C lies on the circle.", "B"), ("The answer is B. C is wrong.", "B"),
    ("Answer: B (C and D are too large)", "B"), ("The answer is B, not C.", "B"), ("Answer: (B) C", "B"),
    ("The answer is B, since A and C are not integers.", "B"), ("The answer is B - the others fail.", "B"),
    ("Answer: B\n\nA) 1\nB) 2", "B"), ("Therefore the answer is B, while C would need x>0.", "B"),
]  # fmt: skip


def test_right() -> None:
    missed = [(pair, verdict) for pair in RIGHT if (verdict := verify(*pair, "answer")).outcome != "correct"]
    assert missed == []


def test_wrong() -> None:
    assert [pair for pair in WRONG if verify(*pair, "answer").outcome == "correct"] == []


KINDS = {
    "clauses": (CLAUSES_RIGHT, CLAUSES_WRONG),
    "scaled": (SCALED_RIGHT, SCALED_WRONG),
    "units": (UNITS_RIGHT, UNITS_WRONG),
    "about": (ABOUT_RIGHT, ABOUT_WRONG),
    "joined": (JOINED_RIGHT, JOINED_WRONG),
    "notations": (NOTATIONS_RIGHT, NOTATIONS_WRONG),
    "formulas": (FORMULAS_RIGHT, FORMULAS_WRONG),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    right, wrong = KINDS[kind]
    assert [pair for pair in right if verify(*pair, "answer").outcome != "correct"] == []
    assert [pair for pair in wrong if verify(*pair, "answer").outcome == "correct"] == []


ASKED = [  # question, gold, answer, whether it is right
    ("Write 22 in base 3.", "211_3", "211", True), ("Write 22 in base three.", "211", "211_3", True), ("Write 22 in binary.", "10110_2", "10110", True),
    ("Convert $42$ to hexadecimal.", r"\text{2A}_{16}", "2a", True), ("Write 22 in base $3$.", "211_{3}", "22", False), ("Write 22 in base 3.", "211_3", "112", False),
    ("Convert $21_5$ from base 5 to base 10.", "11", "11_5", False), ("How many is it?", "211_3", "211", False), ("Write 22 in base 3.", "211_3", "211_4", False),
    ("Is $g$ even or odd?", r"\text{Even}", "even", True), ("True or false: 1=1?", r"\text{True}", r"\text{true}", True), ("Is $g$ even or odd?", r"\text{Even}", "odd", False),
]  # fmt: skip


@pytest.mark.parametrize(("question", "gold", "answer", "is_right"), ASKED)
def test_the_question_says_which_base_and_which_words(question: str, gold: str, answer: str, is_right: bool) -> None:
    verdict = verify(gold, rf"\boxed{{{answer}}}", question=question)
    assert (verdict.outcome == "correct") == is_right, verdict


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_letters(text: str, letter: str | None) -> None:
    assert verify("B", text, "mc", OPTIONS).extracted == letter


def _documented() -> list[tuple[str, str, bool]]:
    """(gold, answer, whether it is right) of the table of docs/grading.md."""
    page = (Path(__file__).parents[2] / "docs" / "grading.md").read_text(encoding="utf-8")
    table = page.partition("| gold | right | wrong |\n|---|---|---|\n")[2].partition("\n\n")[0]
    said = []
    for line in table.splitlines():
        gold, right, wrong = (re.findall("`([^`]+)`", cell) for cell in line.strip("|").split(" | "))
        said += [(gold[0], answer, True) for answer in right] + [(gold[0], answer, False) for answer in wrong]
    return said


def test_the_page_on_grading_is_true() -> None:
    said = _documented()
    assert len(said) > 80
    assert [case for case in said if (verify(*case[:2], "answer").outcome == "correct") != case[2]] == []
