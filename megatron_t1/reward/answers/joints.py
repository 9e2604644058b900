r"""Whether "and" and "or" make a difference between the items of two lists.

They list the same of values of one thing: 2 and 3, x = 2 or x = 3, two lines. They do not where the items are said of
different things, x = 0 or y = 0; a comma is an "and" there. Of bare letters (p, q) it depends on whether both say one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_t1.reward.answers.brackets import depths
from megatron_t1.reward.answers.kinds import Answer, List, Number, Quantity, Relation
from megatron_t1.reward.answers.normalize import compact

_JOINT = re.compile(r"\\(?:land|lor)(?![a-zA-Z])")
_LETTER = re.compile(r"(?:\\neg\s*)?[A-Za-z]")


def joints_clash(gold: Answer, answer: Answer) -> bool:
    """Whether one says "or" and the other doesn't, of items where that matters."""
    joints = [_joints(each) for each in (gold, answer)]
    if ("\\lor" in joints[0]) == ("\\lor" in joints[1]):
        return False
    lists = [each.items for each in (gold, answer) if isinstance(each, List)]
    return any(map(_are_conditions, lists)) or (all(joints) and any(map(_are_letters, lists)))


def _joints(answer: Answer) -> set[str]:
    """Outside its brackets."""
    found = list(_JOINT.finditer(answer.text)) if isinstance(answer, List) else []
    depth = depths(answer.text) if found else []
    return {m[0] for m in found if depth[m.start()] == 0}


def _are_conditions(items: Sequence[Answer]) -> bool:
    """Inequalities, or numbers for different names."""
    relations = [item for item in items if isinstance(item, Relation)]
    if any(not set(relation.operators) <= {"=", "\\in", "\\approx"} for relation in relations):
        return True
    named = {compact(item.name).split("_")[0] for item in relations if isinstance(item.value, (Number, Quantity))}
    return len(named) > 1 and len(relations) == len(items) and all(item.value for item in relations)


def _are_letters(items: Sequence[Answer]) -> bool:
    return all(_LETTER.fullmatch(item.text) for item in items)
