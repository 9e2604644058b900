"""docs/library.md: every example runs, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.servers.servers import Servers
from tests.forks import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples before have defined."""
    return {}


@pytest.mark.parametrize("block", BLOCKS[:-1], ids=["head", "grader", "packing", "conversion"])
def test_an_example_runs(block: str, names: dict[str, Any], tiny_dir: Path, tmp_path: Path) -> None:
    names |= {"model_dir": tiny_dir, "work": tmp_path}
    exec(block, names)  # noqa: S102 - of our own page


def test_the_example_with_servers_runs(names: dict[str, Any], server: Servers, tiny_dir: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(server.all[0].key)
    key_file.chmod(0o600)
    names |= {"model_dir": tiny_dir, "work": tmp_path, "url": server.all[0].url, "key_file": str(key_file)}
    exec(BLOCKS[-1], names)  # noqa: S102
