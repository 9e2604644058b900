"""The digest of a piece: trainer and server make it each from its own numbers, and compare."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

import torch

from megatron_t1.weights.buffers import bytes_of

_WORD = torch.int64.itemsize


def digest_kind(view: torch.Tensor, shape: Sequence[int]) -> str:
    """How to digest a piece whose shape in the Hugging Face tensor is `shape`; `view` may split its dimensions further.

    `rows` where both sides see the same rows of whole 64-bit words, else `crc32`.
    """
    same_rows = len(shape) >= 2 and view.shape[-1] == shape[-1]
    return "rows" if same_rows and shape[-1] * view.element_size() % _WORD == 0 else "crc32"


def digest(view: torch.Tensor, kind: str) -> str:
    """Digest of a piece, the same on both sides whatever the strides.

    `rows`: the rows' sums as 64-bit words modulo 2^64, then BLAKE2 over the sums. It reads memory once at nearly
    memcpy's speed (CRC-32 takes five times as long), and any single changed word changes it. It misses words that
    change places within one row, which no transport does to a row that it copies whole.
    """
    if kind == "crc32":
        return f"crc32:{zlib.crc32(bytes_of(view.detach().cpu().contiguous())):08x}"
    sums = _as_words(view.detach()).sum(dim=-1).contiguous().cpu()
    return f"rows:{hashlib.blake2b(sums.numpy(), digest_size=16).hexdigest()}"


def _as_words(view: torch.Tensor) -> torch.Tensor:
    ratio = _WORD // view.element_size()
    aligned = view.data_ptr() % _WORD == 0 and view.storage_offset() % ratio == 0
    if not aligned or view.stride(-1) != 1 or any(stride % ratio for stride in view.stride()[:-1]):
        view = view.clone(memory_format=torch.contiguous_format)
    return view.view(torch.int64)
