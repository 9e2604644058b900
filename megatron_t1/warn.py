"""The one way in which a running job warns: a line on stderr that leaves progress bars whole."""

from __future__ import annotations

import sys

from tqdm import tqdm


def warn(text: str) -> None:
    """Says `warning: <text>` at once. What ends a job is an exception, not a warning."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
    sys.stderr.flush()
