"""The trainer's GPU memory, given away while servers on the same GPUs generate (`parallel.offload`), and taken back.

Storages are emptied in place, so that every view of them, Megatron's buckets and our pieces among them, is whole again
when they are filled. What nothing else tells waits in one pinned buffer on the host; gradients, which a step begins by
zeroing, the anchor's copy, which is its average rounded, and Transformer Engine's FP8 copies of all weights, which the
first microbatch makes anew, are dropped. Megatron-Core 0.16's own helpers rebind tensors, which parts views from their
buffers, and pin nothing of the optimizer's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch

from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.step import Engine
from megatron_t1.weights.buffers import mapped

_ALIGNED = 512
"""Bytes, as CUDA's allocator aligns."""


class Offload:
    """Of this rank's memory. Given what is given, `give` does nothing, as `take` with what is there."""

    def __init__(self, engine: Engine, anchor: Anchor | None) -> None:
        self._engine, self._anchor, self._kind = engine, anchor, engine.parallel.offload
        self._host = torch.empty(0, dtype=torch.uint8)
        self._kept: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def host_bytes(self) -> int:
        """Pinned on the host so far: what was moved at most."""
        return self._host.numel()

    @torch.no_grad()
    def give(self) -> None:
        """Free what `parallel.offload` names, and what torch's allocator holds for nobody."""
        if self._kind != "none" and not self._dropped:
            kept, dropped = self._storages()
            self._kept = list(zip(kept, self._places(kept), strict=True))
            for storage, place in self._kept:
                place.copy_(_bytes_of(storage), non_blocking=True)
            self._dropped = [(storage, storage.nbytes()) for storage in dropped]
            _wait()
            for storage in (*kept, *dropped):
                storage.resize_(0)
            self._drop_fp8()
        free_cache()

    @torch.no_grad()
    def take(self) -> None:
        """Bring back bit by bit what was given; gradients have any numbers."""
        if not self._dropped:
            return
        for storage, place in self._kept:
            storage.resize_(place.numel())
            _bytes_of(storage).copy_(place, non_blocking=True)
        for storage, num_bytes in self._dropped:
            storage.resize_(num_bytes)
        self._kept, self._dropped = [], []
        if self._anchor:
            self._anchor.publish()
        _wait()

    def _storages(self) -> tuple[list[torch.UntypedStorage], list[torch.UntypedStorage]]:
        """(what is kept on the host, what is dropped), each once."""
        engine, anchor = self._engine, self._anchor
        weights = _storages_of(param for chunk in engine.chunks for param in chunk.parameters())
        kept = _storages_of(_optimizer_tensors(engine)) | _storages_of(anchor.average if anchor else ())
        buffers = (buffer for ddp in engine.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers))
        dropped = _storages_of(buffer.grad_data for buffer in buffers) | _storages_of(anchor.weights if anchor else ())
        if self._kind == "all":
            kept |= weights
        else:  # in float32 they are the optimizer's too
            kept = {key: storage for key, storage in kept.items() if key not in weights}
        return list(kept.values()), [storage for key, storage in dropped.items() if key not in kept]

    def _drop_fp8(self) -> None:
        """What the layers keep from microbatch to microbatch: TransformerEngineBaseModule.get_weight_workspace."""
        for chunk in (*self._engine.chunks, *(self._anchor.chunks if self._anchor else ())):
            for module in chunk.modules():
                getattr(module, "_fp8_workspaces", {}).clear()

    def _places(self, storages: list[torch.UntypedStorage]) -> Iterator[torch.Tensor]:
        """For each storage as many bytes of the pinned buffer, which grows when the optimizer has made its moments."""
        sizes = [storage.nbytes() for storage in storages]
        ends = list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))
        if ends[-1] > self._host.numel():
            self._host = torch.empty(0, dtype=torch.uint8)  # before there is more
            self._host = _pinned(ends[-1])
        return (self._host[begin : begin + size] for begin, size in zip(ends, sizes, strict=False))


def free_cache() -> None:
    """Give the GPU what torch's allocator holds for nobody."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _optimizer_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    """Float32 weights and moments."""
    for part in engine.optimizer.chained_optimizers:
        if part.is_stub_optimizer:  # of a rank without such parameters
            continue
        yield from (param for group in part.optimizer.param_groups for param in group["params"])
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim)


def _storages_of(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """By address. What NumPy has seen on the CPU, as an export's weights, can't be emptied any more and stays."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes() and storage.resizable()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _pinned(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] on the host. torch's own pinned memory is rounded up to a power of two; and the kernel would
    copy pinned pages into every fork that writes a checkpoint."""
    host = mapped(num_bytes, in_forks=False)
    if torch.cuda.is_available():
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(host.data_ptr(), num_bytes, 0))
        weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr()).atexit = False
    return host


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
