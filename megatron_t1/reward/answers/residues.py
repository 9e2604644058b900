r"""Residue classes: 3 \pmod 7, the whole numbers 7k+3, and the residue 3 itself."""

from __future__ import annotations

from typing import Any

import mpmath

from megatron_t1.reward.answers.evaluate import Meter, evaluate

_TRIED = (0, 1, 2, -3, 17 / 8)


def same_residues(gold: Any, answer: Any, meter: Meter) -> bool:
    r"""Of two trees, one of which has a modulus: 3 is the answer 3 \pmod 7, but 7k+3 and 3 \pmod 7 need more than 3.

    Raises:
        UndecidableError: see `same_value`.
    """
    of_gold, of_answer = _residue(gold, meter), _residue(answer, meter)
    if of_gold is None and gold.is_Integer and of_answer:
        return answer.args[0] == gold and 0 <= gold < of_answer[1]
    return of_gold is not None and of_gold == of_answer


def _residue(tree: Any, meter: Meter) -> tuple[int, int] | None:
    """(least residue, modulus)"""
    if type(tree).__name__ == "pmod":
        number, modulus = tree.args
        whole = number.is_Integer and modulus.is_Integer and modulus > 1
        return (int(number % modulus), int(modulus)) if whole else None
    if len(tree.free_symbols) != 1:
        return None
    (letter,) = tree.free_symbols
    if letter.name in "xyz":  # a line
        return None
    first, second, *others = (evaluate(tree, {letter.name: mpmath.mpf(n)}, meter) for n in _TRIED)
    slope = second - first
    if not (mpmath.isint(first) and mpmath.isint(slope) and abs(slope) > 1):
        return None
    is_linear = all(first + n * slope == value for n, value in zip(_TRIED[2:], others, strict=True))
    return (int(first % abs(slope)), int(abs(slope))) if is_linear else None
