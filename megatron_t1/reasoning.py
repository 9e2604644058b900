"""The words by which a reasoning shows; T1's paper counts some along the training ("wait", "perhaps", ...).

English alone, and as substrings: a count of words tells how a model's habits change, not whether they help.
"""

from __future__ import annotations

import re

HABITS = {
    "wait": ("wait", "hold on"),
    "perhaps": ("perhaps", "maybe", "might"),
    "alternatively": ("alternativ", "another way", "another approach", "different approach"),
    "check": ("check", "verif", "confirm"),
    "mistake": ("mistake", "error", "wrong", "incorrect", "actually", ", no"),
}
"""Name of a habit -> its words."""
REVISION = re.compile(
    r"\b(?:wait|hold on|alternativ\w+|mistakes?|wrong|incorrect|actually|another (?:way|approach))\b|, no\b|\bno, "
    r"|\b(?:is|does|do|can|did)(?:n't| not) (?:work|right|match|hold)\b",
    re.I,
)
"""Words of somebody who takes something back."""


def count(text: str) -> dict[str, int]:
    """How often each habit's words stand in a response."""
    lower = text.lower()
    return {name: sum(map(lower.count, words)) for name, words in HABITS.items()}
