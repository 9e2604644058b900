"""The digest of a piece: trainer and server make it each from its own numbers, and compare."""

from __future__ import annotations

import hashlib
import zlib
from typing import NamedTuple

import torch

from megatron_t1.push.layout import PieceSpec
from megatron_t1.weights.buffers import bytes_of
from megatron_t1.weights.sums import are_words, row_sums, word_sum


class Summary(NamedTuple):
    """Of a piece, by the rank that has it; goes to rank 0 as JSON."""

    digest: str
    word_sum: int
    """For the fingerprint of the whole model."""


def summarize(view: torch.Tensor, piece: PieceSpec) -> Summary:
    """`view` may split the piece's dimensions further. Memory is read once.

    The digest is `rows` where both sides see the same rows of whole 64-bit words, else `crc32`.
    """
    view, itemsize = view.detach(), view.element_size()
    same_rows = len(piece.shape) >= 2 and view.shape[-1] == piece.shape[-1]
    if not (same_rows and are_words(piece.shape[-1], itemsize)):
        return Summary(_crc32(view), word_sum(view, piece.index))
    sums = row_sums(view)
    is_cut_at_words = are_words(piece.start[-1], itemsize)
    return Summary(_rows(sums), int(sums.sum()) if is_cut_at_words else word_sum(view, piece.index))


def agrees(view: torch.Tensor, expected: str) -> bool:
    """Whether what arrived has the digest of what was sent, whatever the strides."""
    made = _rows(row_sums(view)) if expected.startswith("rows:") else _crc32(view)
    return made == expected


def _crc32(view: torch.Tensor) -> str:
    return f"crc32:{zlib.crc32(bytes_of(view.cpu().contiguous())):08x}"


def _rows(sums: torch.Tensor) -> str:
    """Any single changed word changes it, and it takes a fifth of CRC-32's time. It misses words that change places
    within one row, which no transport does to a row that it copies whole."""
    return f"rows:{hashlib.blake2b(sums.numpy(), digest_size=16).hexdigest()}"
