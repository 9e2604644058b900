"""Sums of a model's numbers as 64-bit words, modulo 2^64: they add up to the same however its tensors are cut."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

_WORD = torch.int64.itemsize
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def are_words(num_columns: int, itemsize: int) -> bool:
    """Whether rows of so many numbers are whole words."""
    return num_columns * itemsize % _WORD == 0


def row_sums(view: torch.Tensor) -> torch.Tensor:
    """Of every row, whose numbers are whole words: int64, on the CPU. Memory is read once, at nearly memcpy's speed."""
    ratio = _WORD // view.element_size()
    aligned = view.data_ptr() % _WORD == 0 and view.storage_offset() % ratio == 0
    if not aligned or view.stride(-1) != 1 or any(stride % ratio for stride in view.stride()[:-1]):
        view = view.clone(memory_format=torch.contiguous_format)
    return view.view(torch.int64).sum(dim=-1).contiguous().cpu()


def word_sum(view: torch.Tensor, index: Sequence[tuple[int, int]]) -> int:
    """What a piece adds to the sum of its tensor's words: rows are divided into words from column 0 on.

    Args:
        view: the piece's numbers; it may split their dimensions further.
        index: (start, stop) of the piece in each dimension of the tensor.
    """
    itemsize = view.element_size()
    start, stop = index[-1] if index else (0, 1)
    if view.shape[-1:] == (stop - start,) and are_words(start, itemsize) and are_words(stop, itemsize):
        return int(row_sums(view).sum())
    bits = view.reshape(-1, stop - start).view(_BITS[itemsize]).to(torch.int64)
    if itemsize < _WORD:
        bits &= (1 << 8 * itemsize) - 1
    places = torch.arange(start, stop, device=bits.device) % (_WORD // itemsize)
    return int((bits << 8 * itemsize * places).sum())


def fingerprint(sums: Iterable[tuple[str, int]]) -> str:
    """Of all pieces' (tensor, word sum), in any order.

    It tells weights apart that a step or a rounding changed; words that change places within a tensor it misses.
    """
    total: Counter[str] = Counter()
    for name, added in sums:
        total[name] += added
    words = {name: total[name] % (1 << 64) for name in sorted(total)}
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
