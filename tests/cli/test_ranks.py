"""Children are started so that neither the host's name nor files in the current folder matter."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_t1.cli import ranks
from megatron_t1.servers import launch
from megatron_t1.servers.config import RolloutConfig


def test_ranks_of_one_machine_meet_on_its_loopback_address() -> None:
    config = ranks.config_of(2)
    assert (config.local_addr, config.rdzv_endpoint) == ("127.0.0.1", "127.0.0.1:0")


def test_ranks_and_servers_import_installed_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for device in ("cpu", "cuda"):
        env = launch.environment(RolloutConfig(), index=0, key="", device=device)
        assert env["PYTHONSAFEPATH"] == "1"
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in env, "it is the trainer's"
    seen: list[str | None] = []

    def elastic_launch(*_: Any) -> Any:
        return lambda *_: seen.append(ranks.os.environ.get("PYTHONSAFEPATH"))

    monkeypatch.setattr(ranks, "elastic_launch", elastic_launch)
    before = {number: ranks.signal.getsignal(number) for number in (ranks.signal.SIGUSR1, ranks.signal.SIGTERM)}
    monkeypatch.setenv("PYTHONSAFEPATH", "0")
    try:
        ranks.start(2, [], alone=lambda _: 0)
    finally:
        for number, handler in before.items():
            ranks.signal.signal(number, handler)
    assert seen == ["1"]
