"""One result a case, as a JSON line; what goes wrong in a case is a result too, and the next case still runs."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """One check while it runs: its name, where it may write, and how large its cases are."""

    name: str
    out: Path
    """results.jsonl and logs/ are here; `work` is for the check's own files."""
    smoke: bool
    """Tiny sizes on the CPU: finds faults of the check itself before a GPU is paid for."""

    @property
    def work(self) -> Path:
        folder = self.out / "work" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def report(self, case: str, fine: bool | None, **fields: Any) -> None:
        """`fine`: None for a figure that nothing is expected of."""
        status = "info" if fine is None else "ok" if fine else "FAIL"
        line = json.dumps({"check": self.name, "case": case, "status": status, **fields}, default=str)
        print("RESULT", line, flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-5:]
            said = f"{type(error).__name__}: {error}"[:700]
            self.report(name, False, error=said, at=where, seconds=round(time.monotonic() - began, 1))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| over the whole tensor."""
    got, want = got.double(), want.double().to(got.device)
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """What earlier cases held goes back, and the peak is counted anew."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
