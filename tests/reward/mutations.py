r"""Other spellings of an answer, and other answers that look like it.

Every generator gives None for an answer that it has nothing to change in. A change is one that no policy forgives: not
the name in front of "=", not a word, no digit of a subscript or inside \text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Mutation = Callable[[str, random.Random], str | None]
_NUMBER = re.compile(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d.,])")
_SINGLE = re.compile(r"(?<![\\a-zA-Z{])([xyabcntk])(?![a-zA-Z}])")


def _sub(pattern: str, replacement: str) -> Mutation:
    def mutation(gold: str, _: random.Random) -> str | None:
        changed = re.sub(pattern, replacement, gold)
        return changed if changed != gold else None

    return mutation


def _whole(gold: str) -> bool:
    return bool(re.fullmatch(r"-?\d+", gold))


EQUAL: dict[str, Mutation] = {
    "display fractions": _sub(r"\\frac", r"\\dfrac"),
    "braces on": _sub(r"([_^])([A-Za-z0-9])(?![A-Za-z0-9])", r"\1{\2}"),
    "braces off": _sub(r"([_^])\{([A-Za-z0-9])\}(?![A-Za-z0-9])", r"\1\2"),
    "root as power": _sub(r"\\sqrt\{([^{}]*)\}", r"{\1}^{1/2}"),
    "sized brackets": _sub(r"(?<![\\A-Za-z])\(([^()]*)\)", r"\\left(\1\\right)"),
    "a slash": _sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", r"\1/\2"),
    "thin spaces": _sub(r"(?<![\d{])([+=,])(?!\d{3}|\s*\\!)", r"\1\\, "),
    "no spaces": _sub(r"(?<=[^A-Za-z}])\s+(?=[^A-Za-z\d])", ""),
    "a box of its own": lambda gold, _: rf"\boxed{{{gold}}}",
    "dollars": lambda gold, _: None if "$" in gold else f"${gold}$",
    "a point": lambda gold, _: f"{gold}.",
    "a name": lambda gold, _: f"x = {gold}" if _NUMBER.fullmatch(gold) else None,
    "a decimal": lambda gold, _: f"{gold}.0" if _whole(gold) else None,
    "thousands": lambda gold, _: f"{int(gold):,}" if _whole(gold) and len(gold) > 4 else None,
    "a quotient": lambda gold, _: rf"\frac{{{2 * int(gold)}}}{{2}}" if _whole(gold) and len(gold) < 9 else None,
    "a unit": lambda gold, _: rf"{gold}\text{{ cm}}" if _whole(gold) else None,
    "a chain": lambda gold, _: f"{int(gold) - 1}+1={gold}" if _whole(gold) and len(gold) < 9 else None,
    "a sum turned": lambda gold, _: _turned(gold),
}


def _turned(gold: str) -> str | None:
    """a+b as b+a, of two plain terms."""
    m = re.fullmatch(r"([A-Za-z0-9\\{}^]+)\+([A-Za-z0-9\\{}^]+)", gold.replace(" ", ""))
    if m is None or "text" in gold or "circ" in gold or m[1].count("{") != m[1].count("}"):
        return None
    return f"{m[2]}+{m[1]}"


def _value_at(gold: str) -> int:
    """Where the value begins: behind the last "=" of "x = 5"."""
    return gold.rfind("=") + 1


def _one(pattern: re.Pattern[str], change: Callable[[re.Match[str], random.Random], str]) -> Mutation:
    def mutation(gold: str, generator: random.Random) -> str | None:
        if re.search(r"\\text|\\mathrm|[A-Za-z]{4}(?<!frac|sqrt|left|ight|info|inom|heta|cdot)|_|\\infty", gold):
            return None
        found = list(pattern.finditer(gold, _value_at(gold)))
        if not found:
            return None
        m = generator.choice(found)
        return gold[: m.start()] + change(m, generator) + gold[m.end() :]

    return mutation


def _other_digit(m: re.Match[str], generator: random.Random) -> str:
    at = generator.choice([i for i, char in enumerate(m[0]) if char.isdigit()])
    return m[0][:at] + str((int(m[0][at]) + generator.randrange(1, 9)) % 10) + m[0][at + 1 :]


CHANGED: dict[str, Mutation] = {
    "digit changed": _one(_NUMBER, _other_digit),
    "sign changed": _one(re.compile(r"(?<=[\w})\]])\s*[+-]"), lambda m, _: "-" if "+" in m[0] else "+"),
    "variable changed": _one(_SINGLE, lambda m, generator: generator.choice("pqrsuvw")),
    "times two": lambda gold, _: rf"2\cdot({gold})" if _NUMBER.fullmatch(gold) and float(gold) else None,
    "negative": lambda gold, _: f"-{gold}" if _NUMBER.fullmatch(gold) and float(gold) else None,
    "one more": lambda gold, _: f"({gold})+1" if re.fullmatch(r"[\dx+\-^{}]+", gold) else None,
    "an item less": lambda gold, _: gold[: gold.rfind(",")] if re.fullmatch(r"-?\d+(?:,\s*-?\d+){2,}", gold) else None,
    "the other ends": lambda gold, _: _other_ends(gold),
    "power changed": _one(re.compile(r"(?<=\^)\d|(?<=\^\{)\d(?=\})"), lambda m, _: str(int(m[0]) + 1)),
    "unit changed": lambda gold, _: _sub(r"\\text\{\s*(?:cm|inches|feet|hours)\s*\}", r"\\text{ km}")(
        gold, random.Random(0)
    ),
}


def _other_ends(gold: str) -> str | None:
    m = re.fullmatch(r"([\[(])(.*,.*)([\])])", gold)
    return None if m is None or "(" in m[2] else "[("[m[1] == "["] + m[2] + "])"[m[3] == "]"]
