"""`t1 serve` beside a trainer on the same GPUs: whose turn it is, and what the trainer gave up. The servers are
processes that answer like vLLM, since no real one can be made to start slowly, or to refuse to sleep, on demand."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.registry import Orders, Registry
from megatron_t1.servers.serve import serve
from megatron_t1.servers.server import ASLEEP, ServerError
from megatron_t1.servers.servers import Servers
from megatron_t1.stop import STOP

pytestmark = pytest.mark.usefixtures("open_servers")

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
folder, port = Path(sys.argv[1]), int(sys.argv[2])
if (folder / "broken").exists():
    sys.exit("no such model")
if (folder / "disturbed").exists():
    (folder / "disturbed").unlink()
    sys.exit("AssertionError: Error in memory profiling. Initial free memory 9.0 GiB, current free memory 12.0 GiB.")
while (folder / "slow").exists():
    time.sleep(0.02)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"/v1/models": b'{"data": [{"max_model_len": 9}]}', "/weight_info": b'{"weight_version": "default"}',
                "/is_paused": b'{"is_paused": false}'}.get(self.path, b"")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said)
    def do_POST(self):
        self.send_response(500 if (folder / "refuses").exists() else 200)
        self.end_headers()
HTTPServer(("", port), Handler).serve_forever()
"""
SHARED = {"device": "cpu", "share_gpus": True, "sleep": True, "startup_timeout_s": 100}


@pytest.fixture
def host(tmp_path: Path, monkeypatch) -> Iterator[Callable[[list[str]], Future[None]]]:
    """Starts a host's `t1 serve`, which says things into a list; a file in tmp_path of that name makes its servers
    `slow`, `broken`, one that `refuses`, or one whose first start is `disturbed`."""

    def command(cfg: RolloutConfig, model_dir: Path, *, port: int, **_: Any) -> list[str]:
        return [sys.executable, "-c", SERVER, str(tmp_path), str(port)]

    monkeypatch.setattr("megatron_t1.servers.launch.command", command)
    monkeypatch.setattr("megatron_t1.servers.serve._LOOK_INTERVAL_S", 0.05)
    (tmp_path / "config.json").touch()  # a model's folder
    cfg = RolloutConfig(host="0.0.0.0", **SHARED)
    with ThreadPoolExecutor(1) as pool:
        try:
            yield lambda said: pool.submit(serve, cfg, tmp_path, tmp_path, said.append)
        finally:
            (tmp_path / "servers/orders").write_text("[")  # which ends it


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def test_servers_start_in_their_turn_and_end_when_they_are_given_up(host, tmp_path: Path, monkeypatch) -> None:
    registry, said = Registry(tmp_path / "servers"), []
    registry.order(Orders(trainers_turn=True))  # of a trainer that was killed
    serving = host(said)
    until(lambda: said)
    assert said == [f"it is the trainer's turn ({registry.folder}): the servers start when the trainer lets them"]
    assert registry.entries() == {}
    with Servers(RolloutConfig(await_servers=1, **SHARED), "", tmp_path) as servers:
        (first,) = servers.start().wait_ready().all
        assert not first.url.startswith("http://0.0.0.0:"), "nobody on another host would find it there"
        servers.sleep()
        assert first.version == ASLEEP
        servers.wake("kv_cache")

        (tmp_path / "slow").touch()
        first.unusable = "unknown weights"  # a push failed in its load: /health says nothing of that
        servers.revive()
        assert not first.healthy(), "it would be found again"
        (tmp_path / "slow").unlink()
        assert servers.wait_ready().alive()

        (tmp_path / "refuses").touch()
        servers.sleep()
        (second,) = servers.all
        assert second.unusable
        assert not second.healthy(), "it would keep the memory that the trainer takes now"
        (tmp_path / "refuses").unlink()
        (tmp_path / "slow").touch()
        until(lambda: said[-1].endswith("was given up by the trainer and is started again"))
        assert registry.entries() == {}, "not in the trainer's turn"

        servers.wake("kv_cache")
        servers.revive()
        (start,) = until(registry.entries).values()
        assert start.url == ""
        with monkeypatch.context() as patched:
            patched.setattr(STOP, "asked", True)
            servers.sleep()  # at once, for the checkpoint
        assert registry.entries() == {}, "its start took the memory"
        servers.wake("kv_cache")
        until(registry.entries)
        (tmp_path / "slow").unlink()
        assert servers.wait_ready().alive()
    assert registry.orders() == Orders()
    assert not serving.done()


def test_a_server_that_can_not_start_ends_t1_serve(host, tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "broken").touch()
    with pytest.raises(ServerError, match=r"(?s)does not come up: it ended\. Its log ends:.*no such model"):
        host(said := []).result(timeout=120)
    assert [words.endswith("ended and is started again") for words in said] == [True, True], "it may be for the room"


def test_a_start_is_tried_again_that_others_disturbed_by_freeing_the_gpu(host, tmp_path: Path, capfd) -> None:
    """vLLM gives up where others free memory of its GPU while it measures it (its `determine_available_memory`)."""
    (tmp_path / "servers").mkdir()
    (tmp_path / "disturbed").touch()
    with Servers(RolloutConfig(device="cpu", startup_timeout_s=100), tmp_path, tmp_path) as servers:
        assert servers.start().wait_ready().alive()
    assert "found its GPU's memory being freed by others and is started again" in capfd.readouterr().err
