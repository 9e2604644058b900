"""The memory of tensors: as bytes, and used again."""

from __future__ import annotations

import math
from contextlib import suppress
from mmap import MADV_DONTFORK, MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(bytearray())


def mapped(num_bytes: int, *, in_forks: bool = True) -> torch.Tensor:
    """uint8 [num_bytes], 0: memory of its own, which the kernel gets back with the tensor's end, as a heap may not.

    `in_forks`: a fork of this process sees it too.
    """
    memory = mmap(-1, num_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages refuses the advice
        memory.madvise(MADV_HUGEPAGE)
    if not in_forks:
        memory.madvise(MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


class TwoBuffers:
    """Tensors in two pieces of memory in turn, so that one is filled while the other is written somewhere.

    Pages fresh from the kernel cost more than the bytes that are read into them.
    """

    def __init__(self) -> None:
        self._older, self._newer = (torch.empty(0, dtype=torch.uint8) for _ in range(2))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor that holds anything; it is good until the second next call."""
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer, self._older = self._older, self._newer
        if buffer.nbytes < num_bytes:
            del buffer
            buffer = mapped(num_bytes)
        self._newer = buffer
        return buffer[:num_bytes].view(dtype).view(shape)
