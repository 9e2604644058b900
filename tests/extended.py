"""examples/extend as a user has it: installed by pip, beside this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.forks import ROOT

PACKAGE = ROOT / "examples/extend"
PLUGINS = "[my_t1.rewards,my_t1.losses,my_t1.questions,my_t1.llama]"
NEED = '{"function": "add", "calls": [[1, 2], [40, 1]], "returns": [3, 41]}'
"""A gold of the mode `unit_tests`."""


def install(folder: Path, source: Path = PACKAGE) -> Path:
    """Installs a package into `folder`, offline and without a build environment."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300)
    return folder


def program(body: str) -> str:
    """A response whose code is `body`."""
    return f"Here it is.\n```python\n{body}\n```\n"
