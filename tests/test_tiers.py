"""`make test-fast` starts neither ranks nor servers, whatever a test forgets."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["megatron_t1", "megatron_t1.servers.die_with_parent", "torch.distributed.run", "tests.workers.zygote"]
)
def test_what_starts_ranks_or_servers_needs_a_fixture_that_marks_the_test(module: str) -> None:
    with pytest.raises(RuntimeError, match=r"test_tiers\.py.* starts ranks or servers without a fixture of"):
        subprocess.Popen([sys.executable, "-m", module])


def test_a_fixture_marks_the_test(request: pytest.FixtureRequest, start_t1) -> None:
    assert {mark.name for mark in request.node.iter_markers()} >= {"ranks", "servers"}
