"""Memory for tensors, also where the kernel lacks what it is advised to use."""

from __future__ import annotations

import errno
import mmap

import pytest
import torch

from megatron_t1.weights import buffers


class WithoutHugePages(mmap.mmap):
    """As on a kernel built without CONFIG_TRANSPARENT_HUGEPAGE, a real-time one, say (mm/madvise.c)."""

    def madvise(self, option: int, *rest: int) -> None:
        if option == mmap.MADV_HUGEPAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().madvise(option, *rest)


@pytest.mark.parametrize("in_forks", [True, False])
def test_a_kernel_without_huge_pages_maps_memory_too(in_forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "mmap", WithoutHugePages)
    memory = buffers.mapped(5000, in_forks=in_forks)
    assert memory.shape == (5000,)
    assert not memory.any()
    memory.fill_(7)
    assert torch.equal(memory.view(torch.uint8), torch.full((5000,), 7, dtype=torch.uint8))
