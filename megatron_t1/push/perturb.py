"""Weights with a known small change in every tensor, and back to the last bit.

A push of the weights that a server holds already can't show that it took them: what it forgot to renew (a packed copy,
a captured graph, a quantised tensor) says the same as before. A change that is a function of tensor name and index
alone is the same on every rank that holds a part or a copy, whatever the layout, and leaves no part as it was.
"""

from __future__ import annotations

import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from megatron_t1.models.weight_map import Piece

SIZE = 0.25
"""Relative change of a number. Each tensor alone then moves logprobs by 1e-3 to 0.3 nats, biases of attention by less;
a power of two, so that it is a bit of bfloat16's mantissa and not a rounding."""
_OF_ZERO = 2.0**-6
"""What a number becomes (with its sign) that is 0: a tensor of zeros must change too."""


@contextmanager
def perturbed(pieces: Sequence[Piece]) -> Iterator[None]:
    """Inside the block the numbers behind `pieces` are changed; afterwards they are what they were."""
    kept: list[torch.Tensor] = []
    try:
        for piece in pieces:
            kept.append(piece.view.detach().to("cpu", copy=True))
            with torch.no_grad():
                piece.view.copy_(_changed(piece))
        yield
    finally:
        # Backwards: of two pieces of the same numbers the first one kept the right ones.
        for piece, old in reversed(list(zip(pieces, kept, strict=False))):
            with torch.no_grad():
                piece.view.copy_(old)


def _changed(piece: Piece) -> torch.Tensor:
    signs = _signs(piece).to(piece.view.device, piece.view.dtype).view(piece.view.shape)
    return torch.where(piece.view == 0, _OF_ZERO * signs, piece.view * (1 + SIZE * signs))


def _signs(piece: Piece) -> torch.Tensor:
    """int8, the piece's shape: +1 or -1. Products of a sign for each row and one for each column (and so on), so that a
    rank makes its part of a tensor of 10^9 numbers without making the whole."""
    signs = torch.ones((), dtype=torch.int8)
    for dim, (size, part) in enumerate(zip(piece.shape, piece.index, strict=True)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{piece.name} {dim}".encode()))
        along = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)[part] * 2 - 1
        signs = signs[..., None] * along
    return signs


@contextmanager
def held_back_signals(until: str) -> Iterator[None]:
    """What asks the process to end (Ctrl-C, a batch system) takes effect after the block, with its own handler.

    Args:
        until: said when one comes: what is done first.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread alone
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)
        print(f"t1: {signal.Signals(number).name} came; {until} first", file=sys.stderr, flush=True)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, remember)
        yield
    finally:
        for taken, handler in before.items():
            signal.signal(taken, handler)
        if came:
            signal.raise_signal(came[0])
