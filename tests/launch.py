"""Start a worker script on several ranks, as torchrun does, and show its output when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "workers"
"""Scripts that tests run on ranks."""


def run_ranks(script: Path, num_ranks: int, *args: object, timeout_s: float = 600) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    if num_ranks == 1:
        command = [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*command, str(script), *map(str, args)], capture_output=True, text=True, timeout=timeout_s, env=env
    )
    assert done.returncode == 0, f"{script.name} {args} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
