"""Servers on other hosts: announced, found, replaced; the key that hosts agree on; the GPUs that a server gets and what
it is told for them."""

from __future__ import annotations

import contextlib
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_t1.fields import FieldError
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.keys import shared_key
from megatron_t1.servers.launch import command, gpus, public_address
from megatron_t1.servers.registry import Registry
from megatron_t1.servers.serve import _lost
from megatron_t1.servers.server import UNPUSHED, Server, ServerError
from megatron_t1.servers.servers import Servers
from tests.hostile import good_reply, serving


def awaiting(run_dir: Path, count: int, **options) -> Servers:
    shared_key(run_dir / "server_key")
    return Servers(RolloutConfig(await_servers=count, device="cpu", **options), "", run_dir)


def test_announced_servers_are_awaited_and_found(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "servers")
    with serving(good_reply) as one, serving(good_reply) as two, awaiting(tmp_path, 2) as servers:
        assert servers.transport == "tcp", "shared memory does not reach other hosts"
        registry.announce("a_0", one, tmp_path / "a.log")
        late = threading.Timer(0.3, registry.announce, ("b_0", two, tmp_path / "b.log"))
        late.start()
        servers.start().wait_ready()
        assert {server.url for server in servers.usable()} == {one, two}


def test_servers_that_do_not_answer_are_waited_for_at_the_same_time(tmp_path: Path, monkeypatch) -> None:
    """A push looks at those of a host that is gone before every step."""
    registry, all_asked = Registry(tmp_path / "servers"), threading.Barrier(3)
    monkeypatch.setattr(Server, "healthy", lambda *_, **__: all_asked.wait(timeout=30) < 0)
    with awaiting(tmp_path, 3) as servers:
        for name in "abc":
            registry.announce(name, f"http://{name}:1", tmp_path / "a.log")
        servers.start().poll()
    assert not all_asked.broken


def test_a_server_that_came_back_elsewhere_replaces_itself(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "servers")
    with serving(good_reply) as old, serving(good_reply) as new, awaiting(tmp_path, 1) as servers:
        registry.announce("a_0", old, tmp_path / "a.log")
        servers.start().wait_ready()
        (before,) = servers.all
        before.version = 7
        registry.announce("a_0", new, tmp_path / "a.log")
        (after,) = servers.revive()
        assert servers.all == [after]
        assert (after.url, after.version, after.ready) == (new, UNPUSHED, False)
        registry.announce("a_0", new, tmp_path / "a.log")  # at the same place, started again
        (again,) = servers.revive()
        assert again is not after
        assert servers.all == [again]
        assert servers.revive() == []


def test_one_that_is_just_being_started_falls_asleep_with_the_others(tmp_path: Path, monkeypatch) -> None:
    """It would take the memory of the GPU's other user, who did not wait for all; and then none is started."""
    monkeypatch.setattr("megatron_t1.servers.servers._MIN_PATIENCE_S", 0.2)
    registry = Registry(tmp_path / "servers")
    options = {"share_gpus": True, "sleep": True, "health_timeout_s": 0.1}
    with serving(good_reply) as first, serving(good_reply) as second, awaiting(tmp_path, 2, **options) as servers:
        servers.start()
        registry.announce("a_0", first, tmp_path / "a.log")
        assert registry.begin_starts(["b_0"])
        assert len(servers.wait_ready().all) == 1
        threading.Timer(0.5, registry.announce, ("b_0", second, tmp_path / "b.log")).start()
        servers.sleep()
        for server in servers.all:
            assert "/sleep" in server.unusable, "it was asked, which this stand-in does not understand"
        assert registry.given_up() == {"a_0", "b_0"}
        assert not registry.begin_starts(["c_0"])
        assert len(registry.entries()) == 2
        servers.wake("kv_cache")
        assert registry.begin_starts(["c_0"])


def test_a_server_that_a_push_left_behind_and_that_is_gone_is_awaited_anew(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "servers")
    with awaiting(tmp_path, 1, startup_timeout_s=5, health_timeout_s=0.1) as servers:
        with serving(good_reply) as url:
            registry.announce("a_0", url, tmp_path / "a.log")
            servers.start().wait_ready()
            servers.required_version = 3
            assert servers.revive() == [], "it answers: the next push may reach it"
        (again,) = servers.revive()
        assert not again.ready
        with pytest.raises(ServerError, match="was not healthy"):
            servers.wait_ready(minimum=1)


def test_too_few_are_enough_after_the_deadline_none_is_an_error(tmp_path: Path, capsys) -> None:
    with serving(good_reply) as url, awaiting(tmp_path, 2, startup_timeout_s=0.5) as servers:
        with pytest.raises(ServerError, match=r"0 of 2 awaited servers .*t1 serve --rollout.host auto"):
            servers.start().wait_ready()
        Registry(tmp_path / "servers").announce("a_0", url, tmp_path / "a.log")
        assert len(servers.wait_ready().usable()) == 1
        assert "1 of 2 servers are there; going on" in capsys.readouterr().err


def test_a_trainer_started_again_does_not_wait_long_for_a_server_that_is_gone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_t1.servers.servers._MIN_PATIENCE_S", 0.5)
    with serving(good_reply) as url, awaiting(tmp_path, 2, startup_timeout_s=1e6) as servers:
        Registry(tmp_path / "servers").announce("a_0", url, tmp_path / "a.log")
        assert len(servers.start().wait_ready().usable()) == 1


def test_hosts_that_start_together_agree_on_a_key(tmp_path: Path) -> None:
    path = tmp_path / "run" / "server_key"
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(shared_key(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys) == 8
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    path.chmod(0o644)
    with pytest.raises(ServerError, match="readable by others"):
        shared_key(path)


def test_a_server_that_refuses_connections_is_lost_though_its_process_lives() -> None:
    cfg = RolloutConfig(health_timeout_s=5)
    with serving(good_reply) as url:
        server = Server(url=url, key="k", ready=True)
        assert _lost(server, cfg) is None
    assert "no good answer to /health" in (_lost(server, cfg) or "")


def test_a_file_that_announces_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"url": 1}')
    Registry(tmp_path / "other").announce("a_0", "http://h:1", None)
    (tmp_path / "other" / ".b_0.json.tmp.json").write_text("")  # an announcement that is being written
    assert list(Registry(tmp_path / "other").entries()) == ["a_0"]
    with pytest.raises(ServerError, match=r"x.json does not announce a server"):
        Registry(tmp_path).entries()
    (tmp_path / "orders").write_text('{"trainers_turn": 1}')
    with pytest.raises(ServerError, match=r"orders is not the trainer's .*trainers_turn"):
        Registry(tmp_path).orders()


@pytest.mark.parametrize(
    ("visible", "gpu_ids", "index", "expected"),
    [
        (None, (), 1, ["2", "3"]),
        ("4,5,6,7", (), 1, ["6", "7"]),
        ("4,5,6,7", (2, 3, 0, 1), 0, ["6", "7"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", (), 0, ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_count_along_the_visible_ones(visible, gpu_ids, index, expected) -> None:
    assert gpus(RolloutConfig(num_servers=2, tp=2, gpu_ids=gpu_ids), visible, index) == expected


@pytest.mark.parametrize(
    ("trainer_gpus", "options", "fault"),
    [
        (1, {}, r"rollout.gpu_ids = \[0\] has GPUs \[0\], which the trainer's 1 ranks on this host use"),
        (4, {"num_servers": 2, "tp": 2, "gpu_ids": (2, 3, 4, 5)}, r"has GPUs \[2, 3\]"),
        (4, {"num_servers": 2, "tp": 2, "gpu_ids": (4, 5, 6, 7)}, None),
        (0, {}, None),  # evaluation: no trainer
        (1, {"await_servers": 1}, None),  # on other hosts
        (1, {"device": "cpu"}, None),
        (1, {"share_gpus": True}, None),
    ],
)
def test_servers_take_no_gpu_of_the_trainer_unasked(trainer_gpus, options, fault, tmp_path: Path) -> None:
    cfg = RolloutConfig(**{"device": "cuda", **options})
    with pytest.raises(FieldError, match=fault) if fault else contextlib.nullcontext():
        Servers(cfg, "", tmp_path, trainer_gpus=trainer_gpus)


def test_a_shared_gpu_is_pushed_to_through_the_hosts_memory(tmp_path: Path) -> None:
    assert Servers(RolloutConfig(device="cuda"), "", tmp_path).transport == "collective"
    assert Servers(RolloutConfig(device="cuda", share_gpus=True), "", tmp_path).transport == "shm"
    with pytest.raises(FieldError, match="transport"):
        RolloutConfig(share_gpus=True, transport="collective")


def test_too_few_visible_gpus_are_said() -> None:
    with pytest.raises(ServerError, match="needs GPU number 3 and CUDA_VISIBLE_DEVICES=0,1 shows 2"):
        gpus(RolloutConfig(num_servers=2, tp=2), "0,1", 1)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {}, {"head_dtype": "float32"}),
        ("cuda", {"hf_overrides": {"rope_theta": 1e6}}, {"head_dtype": "float32", "rope_theta": 1e6}),
        ("cuda", {"hf-overrides": {"head_dtype": "model"}}, {"head_dtype": "model"}),
        ("cpu", {}, None),
        ("cpu", {"hf_overrides": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
    ],
)
def test_the_head_is_float32_on_gpus(device, given, expected, tiny_dir: Path) -> None:
    cfg = RolloutConfig(vllm_args=given)
    words = command(cfg, tiny_dir, host="localhost", port=1, device=device)
    values = [json.loads(value) for word, value in pairwise(words) if word == "--hf-overrides"]
    assert values == ([] if expected is None else [expected])


def test_what_would_hide_the_overrides_is_refused() -> None:
    with pytest.raises(FieldError, match=r"vllm_args.hf-overrides = .* must be a mapping"):
        RolloutConfig(vllm_args={"hf-overrides": '{"rope_theta": 1e6}'})


def test_what_would_take_the_place_of_the_key_guard_is_refused() -> None:
    for value in ("my.Log", None):
        with pytest.raises(FieldError, match=r"vllm_args.middleware = .* must be left out: .*the server's key"):
            RolloutConfig(vllm_args={"middleware": value})


def test_weights_that_a_trainer_pushes_are_not_read_from_the_disk(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    for folder, asked, expected in ((tiny_dir, True, None), (tiny_dir, False, "dummy"), (tmp_path, True, "dummy")):
        words = command(RolloutConfig(load_weights=asked), folder, host="localhost", port=1, device="cpu")
        assert dict(pairwise(words)).get("--load-format") == expected


def test_the_address_for_other_hosts_is_that_of_the_interface_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert public_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ServerError, match="GLOO_SOCKET_IFNAME = ib7: this host has no such interface"):
        public_address()


def test_servers_take_as_many_positions_as_yarn_makes(tiny_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_dir / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = command(RolloutConfig(), tmp_path, host="localhost", port=1, device="cpu")
    given = dict(pairwise(words))
    assert json.loads(given["--hf-overrides"]) == {"max_position_embeddings": 4096}
    assert given["--max-num-batched-tokens"] == "4096"
