"""What trainer and server agree on: where each tensor lies in the shared bytes, and how a piece is digested.

Both sides import this file, so it needs torch alone and no vLLM. All that crosses the wire is JSON.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
_WORD = torch.int64.itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor in the shared bytes."""

    name: str
    dtype: str
    """torch's name: `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """First byte, a multiple of ALIGNMENT."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.name}: {self.dtype!r} is no dtype")
        return dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def bytes_in(self, buffer: torch.Tensor) -> torch.Tensor:
        """Its bytes, aliasing `buffer` (uint8, all tensors)."""
        return buffer[self.offset : self.offset + self.num_bytes]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor itself, aliasing `buffer`."""
        return self.bytes_in(buffer).view(self.torch_dtype).view(self.shape)


@dataclass(frozen=True)
class PieceSpec:
    """The part of a tensor that one trainer rank writes, and that is digested as a unit."""

    tensor: int
    """Index in the list of TensorSpec."""
    start: tuple[int, ...]
    stop: tuple[int, ...]
    rank: int
    """The trainer rank that writes it."""

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))


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
        return f"crc32:{zlib.crc32(view.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()):08x}"
    sums = _as_words(view.detach()).sum(dim=-1).contiguous().cpu()
    return f"rows:{hashlib.blake2b(sums.numpy(), digest_size=16).hexdigest()}"


def _as_words(view: torch.Tensor) -> torch.Tensor:
    ratio = _WORD // view.element_size()
    aligned = view.data_ptr() % _WORD == 0 and view.storage_offset() % ratio == 0
    if not aligned or view.stride(-1) != 1 or any(stride % ratio for stride in view.stride()[:-1]):
        view = view.clone(memory_format=torch.contiguous_format)
    return view.view(torch.int64)
