"""In words that a person can check: what was read from gold and answer, and by which rules they are equal or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from megatron_t1.reward.answers.equal import Comparison, equal
from megatron_t1.reward.answers.kinds import Answer, Clock, Interval, List, Quantity, Ratio, Region, Relation, Set
from megatron_t1.reward.answers.normalize import compact
from megatron_t1.reward.answers.numbers import exact_number
from megatron_t1.reward.answers.policy import EqualityConfig
from megatron_t1.reward.answers.read import read_both
from megatron_t1.reward.answers.tokens import NO_MATHEMATICS
from megatron_t1.reward.answers.values import equal_cheaply

MAX_STEPS = 8
"""Rules told of one comparison: the last ones decide."""
_RULES = {
    "labelled_equal": "items in any order, by their names where they have some",
    "in_any_order": "items in any order",
    "in_order": "items in their order",
    "relations_equal": "relations",
    "chain_says": "every side of the chain",
    "percents_equal": "percents",
    "agrees_with": "rounded",
    "expressions_equal": "the same value at every point tried",
    "leaves_equal": "values and units",
}


class _Told(Comparison):
    """A comparison that keeps which rules were asked and what they said."""

    def __init__(self, policy: EqualityConfig) -> None:
        super().__init__(policy)
        self.steps: list[str] = []
        for name, rule in _RULES.items():
            setattr(self, name, self._told(rule, getattr(self, name)))

    def _told(self, rule: str, method: Callable[..., bool]) -> Callable[..., bool]:
        def told(gold: Any, answer: Any) -> bool:
            said = method(gold, answer)
            self.steps.append(f"{rule}: {_short(gold)} and {_short(answer)}: {'yes' if said else 'no'}")
            return said

        return told


def _short(part: Any) -> str:
    if isinstance(part, (list, tuple)):
        text = ", ".join(map(_short, part))
    else:
        text = part.text if isinstance(part, Answer) else str(part)
    return text if len(text) <= 60 else text[:57] + "..."


def described(answer: Answer) -> str:
    """What a text was read as."""
    kind = type(answer).__name__.lower()
    match answer:
        case Quantity(value=value, unit=unit):
            powers = " ".join(name if power == 1 else f"{name}^{power}" for name, power in unit.kind)
            factor = "" if unit.factor == 1 else f"{unit.factor} "
            return f"a quantity, {value.text} with the unit {factor}{powers or unit.noun}"
        case Clock(seconds=seconds, half=half):
            return f"a clock time, {seconds} s after midnight{'' if half else ' or noon'}"
        case Relation(name=name, value=Answer() as value) if name:
            return f"a name, {name}, with a value: {described(value)}"
        case Relation(region=Region() as region):
            return described(region)
        case Region(intervals=intervals):
            return f"a region of {len(intervals)} intervals: {_short(intervals)}"
        case Ratio(parts=items) | List(items=items) | Set(items=items):
            return f"a {kind} of {len(items)}: {'; '.join(_short(item) for item in items)}"
        case Interval():
            return f"an interval, {answer.text}"
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}, {_short(answer)}"


def explain(gold: str, answer: str, policy: EqualityConfig) -> str:
    """One line on two normalised answers."""
    if compact(gold) == compact(answer):
        return f"both are spelled {_short(gold)}"
    said = "unread"
    try:
        reads, spelled = read_both(gold, answer)
        said = f"gold: {described(reads)}; answer: {described(spelled)}"
        if (same := equal_cheaply(gold, answer, policy.rounding)) is not None:
            numbers = " and ".join(str(number.value) for text in (gold, answer) if (number := exact_number(text)))
            steps = [f"exact numbers {numbers}: {'equal, or one the other rounded' if same else 'not equal'}"]
            return "; ".join([said, *steps, *_hangs_on(gold, answer, policy, same)])
        told = _Told(policy)
        same = told.equal(reads, spelled)
    except NO_MATHEMATICS as error:
        return f"{said}; cannot be compared: {error or type(error).__name__}"
    steps = told.steps[-MAX_STEPS:] or ["kinds that have no rule in common" if not same else "the same text inside"]
    return "; ".join([said, *steps, *_hangs_on(gold, answer, policy, same)])


def _hangs_on(gold: str, answer: str, policy: EqualityConfig, same: bool) -> Iterator[str]:
    """Other choices of the user's that would turn the verdict."""
    for name, kind in get_type_hints(EqualityConfig).items():
        for other in get_args(kind) or (True, False):
            if _is_equal(gold, answer, replace(policy, **{name: other})) != same:
                yield f"reward.equality.{name} = {str(other).lower()} would turn this"


def _is_equal(gold: str, answer: str, policy: EqualityConfig) -> bool:
    cheap = equal_cheaply(gold, answer, policy.rounding)
    if cheap is not None:
        return cheap
    try:
        return equal(*read_both(gold, answer), policy)
    except NO_MATHEMATICS:
        return False
