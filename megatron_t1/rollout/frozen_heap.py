"""What is loaded, kept out of garbage collection while requests are in flight."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Garbage collection passes over everything that exists now.

    torch and transformers leave about a million objects that never become garbage; thousands of requests in flight make
    Python walk through them again and again, a third of a client's CPU time (benchmarks/client.md).
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # else extension modules report their own objects as leaked at exit
