"""A push by broadcasts, both ends: every trainer rank sends what it owns to all workers at once, in buckets.

Both sides know the order: the tensors layer by layer, cut into spans of whole rows; consecutive spans make a window of
at most `bucket_bytes`, in which every owner broadcasts its own (gloo: at the same time; NCCL: in turn). A member
holds two windows, one of them under way, and a worker the tensors of the module that vLLM has not complete: no rank
gathers the model.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_t1.push.digests import digest
from megatron_t1.push.group import Group, Wait
from megatron_t1.push.layout import ALIGNMENT, Layout, PieceSpec, TensorSpec
from megatron_t1.weights.buffers import mapped

_MAPPED_BYTES = 64 << 20
"""A heap keeps the room of an embedding, and smaller things strew themselves over it."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Span:
    """Rows of a piece."""

    number: int
    """Of the piece, in `Layout.pieces`."""
    piece: PieceSpec
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.piece.shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.piece.tensor.torch_dtype.itemsize


Window = dict[int, list[Span]]
"""Owner (a trainer rank) -> what it sends, in this order."""


def windows(layout: Layout, bucket_bytes: int) -> Iterator[Window]:
    """All spans, the same on every member."""
    window: Window = {}
    room = bucket_bytes
    for number in sorted(range(len(layout.pieces)), key=lambda number: _place(layout.pieces[number].tensor.name)):
        piece = layout.pieces[number]
        rows = piece.shape[0] if piece.shape else 1
        row_bytes = Span(number, piece, 0, 1).num_bytes
        start = 0
        while start < rows:
            count = min(rows - start, max(room // row_bytes, 0 if window else 1))
            if count == 0:
                yield window
                window, room = {}, bucket_bytes
                continue
            span = Span(number, piece, start, start + count)
            window.setdefault(piece.rank, []).append(span)
            start, room = start + count, room - _aligned(span.num_bytes)
    if window:
        yield window


def send(group: Group, layout: Layout, views: list[tuple[torch.Tensor, PieceSpec]]) -> None:
    """A trainer rank's part. `views`: its numbers, in the order of `layout.of_rank`."""
    mine = {piece: view for view, piece in views}
    at: list[tuple[PieceSpec, torch.Tensor]] = []

    def fill(span: Span, target: torch.Tensor) -> None:
        if not at or at[0][0] is not span.piece:
            # Strewn numbers (the queries of a fused QKV) are copied whole, once.
            rows = mine[span.piece].detach().reshape(span.piece.shape or (1,))
            at[:] = [(span.piece, rows)]
        target.copy_(at[0][1][span.start : span.stop])

    for _ in _exchange(group, layout, fill):
        pass


def receive(
    group: Group, layout: Layout, device: torch.device, digests: Sequence[str], bad: list[PieceSpec]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A worker's part: (name, whole tensor on `device`) as they come, to be kept by whoever takes them.

    A piece whose bytes are not those of its digest is put into `bad`: the others must go on, or the group breaks.
    """
    numbers: dict[str, list[int]] = {}
    for number, piece in enumerate(layout.pieces):
        numbers.setdefault(piece.tensor.name, []).append(number)
    missing = {tensor.name: tensor.num_bytes for tensor in layout.tensors}
    begun: dict[str, torch.Tensor] = {}
    for arrived in _exchange(group, layout, None):
        for span, data in arrived:
            spec = span.piece.tensor
            if spec.name not in begun:
                begun[spec.name] = _empty(spec, device)
            target = span.piece.of(begun[spec.name])
            (target[span.start : span.stop] if spec.shape else target[None]).copy_(data)
            missing[spec.name] -= span.num_bytes
        for name in sorted((name for name in begun if missing[name] == 0), key=_place):
            tensor = begun.pop(name)
            for number in numbers[name]:
                piece, expected = layout.pieces[number], digests[number]
                if digest(piece.of(tensor), expected.partition(":")[0]) != expected:
                    bad.append(piece)
            yield name, tensor
            del tensor


def _exchange(
    group: Group, layout: Layout, fill: Callable[[Span, torch.Tensor], None] | None
) -> Iterator[list[tuple[Span, torch.Tensor]]]:
    """Broadcasts all windows; yields the spans of each once they are here, good until the next is asked for."""
    members = {owner: member for member, owner in enumerate(layout.owners)}
    plan = list(windows(layout, group.bucket_bytes))
    size = max(sum(_aligned(span.num_bytes) for spans in window.values() for span in spans) for window in plan)
    buffers = [torch.empty(size, dtype=torch.uint8, device=group.device) for _ in range(2)]
    under_way: deque[tuple[list[Wait], list[tuple[Span, torch.Tensor]]]] = deque()
    group.begin()

    def arrived() -> list[tuple[Span, torch.Tensor]]:
        waits, spans = under_way.popleft()
        for wait in waits:
            wait()
        return spans

    for turn, window in enumerate(plan):
        buffer, begin, end = buffers[turn % 2], 0, 0
        waits: list[Wait] = []
        spans: list[tuple[Span, torch.Tensor]] = []
        for owner in sorted(window):
            begin = end
            for span in window[owner]:
                data = buffer[end : end + span.num_bytes].view(span.piece.tensor.torch_dtype).view(span.shape)
                if members[owner] == group.rank and fill:
                    fill(span, data)
                spans.append((span, data))
                end += _aligned(span.num_bytes)
            waits.append(group.broadcast(buffer[begin:end], members[owner]))
        under_way.append((waits, spans))
        if len(under_way) == 2:
            yield arrived()
    while under_way:
        yield arrived()


def _empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    if device.type == "cpu" and spec.num_bytes >= _MAPPED_BYTES:
        return mapped(spec.num_bytes).view(spec.torch_dtype).view(spec.shape)
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device=device)


def _place(name: str) -> float:
    """Where a tensor stands in the stream: the ranks of a pipeline or of experts list theirs one after the other, and
    vLLM keeps what it got of a module until the module is complete."""
    layer = _LAYER.search(name)
    return int(layer[1]) if layer else -1 if "embed" in name else math.inf


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
