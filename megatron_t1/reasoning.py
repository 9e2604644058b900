"""The words by which a reasoning shows; T1's paper counts some along the training ("wait", "perhaps", ...).

English alone, and as whole words: a count of them tells how a model's habits change, not whether they help.
"""

from __future__ import annotations

import re

_NO = r"no(?=\s*[,.;:!?…])"
"""Said of something, and not of the word that follows: "5, no." but not "no two"."""
HABITS = {
    "wait": ("wait", "hold on"),
    "perhaps": ("perhaps", "maybe", "might"),
    "alternatively": ("alternative(?:ly|s)?", "another way", "another approach", "different approach"),
    "check": ("check(?:s|ed|ing)?", "recheck(?:s|ed|ing)?", "verif(?:y|ies|ied|ying|ication)", "confirm(?:s|ed|ing)?"),
    "mistake": ("mistake[ns]?", "errors?", "wrong(?:ly)?", "incorrect(?:ly)?", "actually", f", {_NO}"),
}
"""Name of a habit -> patterns of its words, each of which begins with plain letters: such a search is ten times as
fast."""
_PATTERNS = {name: [re.compile(rf"{word}(?!\w)") for word in words] for name, words in HABITS.items()}

REVISION = re.compile(
    # Where a sentence or a clause begins: Mike may wait, and what he actually paid is his.
    rf"(?:^|[>.,;:!?…\n(—–]\s{{0,3}}|\b(?:but|oh|no|hmm)\s)(?:(?:wait|hold on|actually|oops|scratch that)\b|{_NO})"
    r"|\b(?:an?|my|this|that) (?:\w+ )?(?:mistake|error)\b(?! (?:of|term|bound))|\bthe mistake\b|\bmistaken\b"
    r"|\b(?:is|was|be|seems|looks|went|\w+['’]s|got (?:it|this|that)) (?:\w+ly |all )?(?:wrong|incorrect)\b"
    r"|\b(?:not|\w+n['’]t) (?:be |quite )*"
    r"(?:work\b(?! (?:on|in|at|for)\b)|right\b(?!.angle)|correct\b|match\b|hold\b|fit\b|add up|check out)"
    r"|\bI(?: had|['’]ve)? (?:forgot|missed|overlooked|misread|mixed up|should have)|\b(?:redo|reconsider|start over)\b"
    r"|\bsecond thought|\bcontradicts\b",
    re.I,
)
"""Somebody takes something back."""


def count(text: str) -> dict[str, int]:
    """How often each habit's words stand in a response."""
    lower = f" {text.lower()}"

    def whole(found: re.Match[str]) -> bool:
        return not lower[found.start() - 1 : found.start() + 1].isalpha()

    return {
        name: sum(whole(found) for pattern in patterns for found in pattern.finditer(lower))
        for name, patterns in _PATTERNS.items()
    }
