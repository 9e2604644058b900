"""The one way in which a running job warns: a line on stderr that leaves progress bars whole."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

_kept: Path | None = None


def keep_in(path: Path) -> None:
    """From now on, this process's warnings are lines of that file too: {"time", "text"}."""
    global _kept
    _kept = path


def warn(text: str) -> None:
    """Says `warning: <text>` at once. What ends a job is an exception, not a warning."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
    sys.stderr.flush()
    if _kept is not None:
        with contextlib.suppress(OSError), _kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "text": text}) + "\n")
