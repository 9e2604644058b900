"""A push by broadcasts, both ends: every trainer rank sends what it owns to all workers at once, in buckets.

Both sides know the order: the tensors layer by layer, cut into spans of whole rows; consecutive spans make a window of
at most `bucket_bytes`, in which every owner broadcasts its own (gloo: at the same time; NCCL: in turn), large spans
from where they lie to where they belong, all others through a bucket. A member has two windows, one of them under way,
and a worker the tensors of the module that vLLM has not complete: no rank gathers the model.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from megatron_t1.push.digests import agrees
from megatron_t1.push.group import Group, Wait
from megatron_t1.push.layout import ALIGNMENT, Layout, PieceSpec, TensorSpec
from megatron_t1.weights.buffers import mapped

_MAPPED_BYTES = 64 << 20
"""A heap keeps the room of an embedding, and smaller things strew themselves over it."""
_SMALL_BYTES = 1 << 20
"""Below, a message of its own costs more than passing through a bucket."""
_SPANS_A_WINDOW = 4
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Span:
    """Rows of a piece."""

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
    for span in _stream(layout, bucket_bytes // _SPANS_A_WINDOW):
        if window and _aligned(span.num_bytes) > room:
            yield window
            window, room = {}, bucket_bytes
        window.setdefault(span.piece.rank, []).append(span)
        room -= _aligned(span.num_bytes)
    if window:
        yield window


def _stream(layout: Layout, span_bytes: int) -> Iterator[Span]:
    """All spans in their order: layer by layer, and what is beside the layers evenly among them.

    The ranks of a pipeline or of experts list theirs one after the other, and vLLM keeps what it got of a module until
    the module is complete. Of an embedding that came by itself it could load nothing until all was there.
    """
    layers: list[tuple[int, PieceSpec]] = []
    others: list[tuple[int, PieceSpec]] = []
    for piece in layout.pieces:
        layer = _LAYER.search(piece.tensor.name)
        (layers if layer else others).append((int(layer[1]) if layer else "embed" not in piece.tensor.name, piece))

    def cut(numbered: list[tuple[int, PieceSpec]]) -> Iterator[tuple[float, Span]]:
        pieces = [piece for _, piece in sorted(numbered, key=itemgetter(0))]
        total = sum(math.prod(piece.shape) * piece.tensor.torch_dtype.itemsize for piece in pieces)
        done = 0
        for piece in pieces:
            num_rows = piece.shape[0] if piece.shape else 1
            rows_a_span = max(1, span_bytes // Span(piece, 0, 1).num_bytes)
            for start in range(0, num_rows, rows_a_span):
                span = Span(piece, start, min(start + rows_a_span, num_rows))
                done += span.num_bytes
                yield done / total, span

    yield from (span for _, span in heapq.merge(cut(layers), cut(others), key=itemgetter(0)))


def send(group: Group, layout: Layout, views: list[tuple[torch.Tensor, PieceSpec]]) -> None:
    """A trainer rank's part. `views`: its numbers, in the order of `layout.of_rank`."""
    mine = {piece: view for view, piece in views}
    at: list[tuple[PieceSpec, torch.Tensor]] = []

    def rows(span: Span) -> torch.Tensor | None:
        if span.piece not in mine:
            return None
        if not at or at[0][0] is not span.piece:
            # Strewn numbers (the queries of a fused QKV) are copied whole, once.
            at[:] = [(span.piece, mine[span.piece].detach().reshape(span.piece.shape or (1,)))]
        return at[0][1][span.start : span.stop]

    for _ in _exchange(group, layout, rows):
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

    def rows(span: Span) -> torch.Tensor:
        spec = span.piece.tensor
        if spec.name not in begun:
            begun[spec.name] = _empty(spec, device)
        target = span.piece.of(begun[spec.name])
        return target[span.start : span.stop] if spec.shape else target[None]

    for arrived in _exchange(group, layout, rows):
        for span, data in arrived:
            target = rows(span)
            if data.data_ptr() != target.data_ptr():
                target.copy_(data)
            missing[span.piece.tensor.name] -= span.num_bytes
        for name in [name for name in begun if missing[name] == 0]:
            tensor = begun.pop(name)
            for number in numbers[name]:
                piece, expected = layout.pieces[number], digests[number]
                if not agrees(piece.of(tensor), expected):
                    bad.append(piece)
            yield name, tensor
            del tensor


def _exchange(
    group: Group, layout: Layout, rows: Callable[[Span], torch.Tensor | None]
) -> Iterator[list[tuple[Span, torch.Tensor]]]:
    """Broadcasts all windows; yields the spans of each once they are here, good until the next is asked for.

    `rows`: where this member has a span's numbers, or wants them; None: it does neither. A span that is a message by
    itself goes from there, or comes there, if its bytes lie together; all others pass through a bucket.
    """
    members = {owner: member for member, owner in enumerate(layout.owners)}
    plan = list(windows(layout, group.bucket_bytes))
    size = max(sum(_aligned(span.num_bytes) for spans in window.values() for span in spans) for window in plan)
    buckets = [torch.empty(size, dtype=torch.uint8, device=group.device) for _ in range(2)]
    under_way: deque[tuple[list[Wait], list[tuple[Span, torch.Tensor]]]] = deque()
    group.begin()

    def arrived() -> list[tuple[Span, torch.Tensor]]:
        waits, spans = under_way.popleft()
        for wait in waits:
            wait()
        return spans

    try:
        for turn, window in enumerate(plan):
            bucket, end = buckets[turn % 2], 0
            waits: list[Wait] = []
            spans: list[tuple[Span, torch.Tensor]] = []
            for owner in sorted(window):
                for message in _messages(window[owner]):
                    begin, alone = end, len(message) == 1
                    for span in message:
                        data, here = bucket[end : end + span.num_bytes], rows(span)
                        end += _aligned(span.num_bytes)
                        data = data.view(span.piece.tensor.torch_dtype).view(span.shape)
                        # The device may be another one: a folder's tensors are on the host.
                        if alone and here is not None and here.is_contiguous() and here.device == bucket.device:
                            data = here
                        elif members[owner] == group.rank:
                            data.copy_(here)
                        spans.append((span, data))
                    whole = data.view(-1).view(torch.uint8) if alone else bucket[begin:end]
                    waits.append(group.broadcast(whole, members[owner]))
            under_way.append((waits, spans))
            if len(under_way) == 2:
                yield arrived()
        while under_way:
            yield arrived()
    except Exception:  # out of memory, say: the other members would wait for this one
        group.close()
        raise


def _messages(spans: list[Span]) -> list[list[Span]]:
    """What an owner sends of a window at a time: the small ones together, each of the others by itself."""
    small = [span for span in spans if span.num_bytes < _SMALL_BYTES]
    return [*([small] if small else []), *([span] for span in spans if span.num_bytes >= _SMALL_BYTES)]


def _empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    if device.type == "cpu" and spec.num_bytes >= _MAPPED_BYTES:
        return mapped(spec.num_bytes).view(spec.torch_dtype).view(spec.shape)
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device=device)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
