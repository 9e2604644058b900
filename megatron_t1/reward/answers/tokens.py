r"""Tokens of LaTeX, and a reader that walks over them: what latex.py reads with."""

from __future__ import annotations

import re

MAX_DEPTH = 30
MAX_TOKENS = 600
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\S")


class UndecidableError(Exception):
    """The expression cannot be read, or is too large to be worth comparing."""


NO_MATHEMATICS = (UndecidableError, RecursionError, ArithmeticError, ValueError, TypeError, AttributeError)
"""What the parser and SymPy raise on text that is none: it is no right answer, and no crash either."""


def is_number(token: str | None) -> bool:
    """Whether it is a plain number."""
    return token is not None and (token[0].isdecimal() or (token[0] == "." and len(token) > 1))


def tokenized(latex: str) -> list[str]:
    """Its tokens.

    Raises:
        UndecidableError: too many.
    """
    tokens = TOKEN.findall(latex)
    if len(tokens) > MAX_TOKENS:
        raise UndecidableError(f"{len(tokens)} tokens")
    return tokens


class Tokens:
    """Tokens with a position and a depth."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        token = self.next
        if token is None:
            raise UndecidableError("it ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UndecidableError(f"{token} is missing")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UndecidableError("nested too deep")

    def group(self) -> list[str]:
        """Tokens of one braced group, or one token."""
        if self.next != "{":
            return [self.take()]
        start, level = self.position + 1, 0
        while True:
            token = self.take()
            level += (token == "{") - (token == "}")
            if not level:
                return self.tokens[start : self.position - 1]

    def name_part(self) -> str:
        """Text of a subscript or decoration."""
        return "".join(self.group())

    def bounds(self) -> tuple[list[str], list[str]]:
        """Tokens below and above a big operator."""
        sides: dict[str | None, list[str]] = {"_": [], "^": []}
        while self.next in sides and not sides[self.next]:
            side = self.take()
            sides[side] = self.group()
        return sides["_"], sides["^"]
