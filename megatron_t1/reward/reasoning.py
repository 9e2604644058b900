"""The words by which a reasoning shows; T1's paper counts some along the training ("wait", "perhaps", ...).

English alone; a count of words tells how a model's habits change, not whether they help.
"""

from __future__ import annotations

import re

PATTERNS = {
    name: re.compile(pattern, re.I)
    for name, pattern in {
        "wait": r"\b(?:wait|hold on)\b",
        "perhaps": r"\b(?:perhaps|maybe|might be)\b",
        "alternatively": r"\b(?:alternat\w+|(?:another|different) (?:way|approach|method))\b",
        "check": r"\b(?:(?:re|double-)?check\w*|verif\w+|confirm\w*)\b",
        "mistake": r"\b(?:mistakes?|mistaken|errors?|wrong|incorrect|actually)\b|, no\b|\bno, "
        r"|\b(?:is|does|do|can|did)(?:n't| not) (?:work|right|match|hold)\b",
    }.items()
}
"""Name of a habit -> its words."""
REVISION = re.compile("|".join(PATTERNS[name].pattern for name in ("wait", "alternatively", "mistake")), re.I)
"""Words of somebody who takes something back."""


def count(text: str) -> dict[str, int]:
    """How often each habit's words stand in a response."""
    return {name: len(pattern.findall(text)) for name, pattern in PATTERNS.items()}
