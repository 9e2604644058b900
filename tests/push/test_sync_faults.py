"""Two real servers of a mixture-of-experts model that are killed, stopped and started anew around weight pushes.

They return raw logprobs, so that the check of the temperature contract has a real server to refuse; the samples that
are held against transformers are drawn at temperature 1, where raw and processed are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.push.ranks import NoServerError
from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.launch import reserve_port
from megatron_t1.servers.registry import Registry
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers
from tests.push import reference
from tests.tiny import make_tiny_qwen2, make_tiny_qwen3_moe
from tests.workers.trainer import NoText

PROMPTS = [[40 + i, 50, 60, 70] for i in range(8)]
SAMPLING = SamplingConfig(temperature=1.0, num_samples=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_tiny_qwen3_moe(tmp_path_factory.mktemp(f"moe{seed}"), seed=seed) for seed in (1, 2)]


CONFIG = RolloutConfig(
    device="cpu",
    num_servers=2,
    dtype="float32",
    max_model_len=512,
    samples_per_request=2,
    sync_timeout_s=30,
    health_timeout_s=3,
    connect_retries=2,
    vllm_args={"logprobs-mode": "raw_logprobs"},
)


@pytest.fixture(scope="module")
def pair(fork_servers, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with fork_servers(CONFIG, folders[0], tmp_path_factory.mktemp("pair")) as servers:
        yield servers


@pytest.fixture
def client(pair: Servers) -> Iterator[RolloutClient]:
    with RolloutClient(pair, NoText(), vocab_size=320) as client:
        yield client


def assert_serve(client: RolloutClient, folder: Path, version: int, servers: list[Server]) -> None:
    """Exactly `servers` answer, and what they sample has the weights of `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = client.complete_tokens(PROMPTS, SAMPLING, seed=version)
    assert {s.server for samples in results for s in samples} == {server.url for server in servers}
    for prompt, samples in zip(PROMPTS, results, strict=True):
        for sample in samples:
            expected = reference.logprobs(model, prompt, sample.token_ids.tolist(), SAMPLING.temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert sample.weight_versions == ((version, 0, len(sample.token_ids)),)


def group_signal(server: Server, number: int) -> None:
    os.killpg(server.process.pid, number)


@contextlib.contextmanager
def before(phase: str, sync: WeightSync, act: Callable[[], None]) -> Iterator[None]:
    """`act` happens just before the servers are called for `phase`, once."""
    fanout, attempt = sync._fanout, sync._fanout.attempt
    acts = [act]

    def act_then_call(name: str, call: Callable[[Server], None]) -> dict[Server, ServerError]:
        if name == phase and acts:
            acts.pop()()
        return attempt(name, call)

    fanout.attempt = act_then_call
    yield
    del fanout.attempt


def stop_for(server: Server, seconds: float) -> None:
    group_signal(server, signal.SIGSTOP)
    threading.Timer(seconds, group_signal, (server, signal.SIGCONT)).start()


def test_pushes_through_kills_stops_and_restarts(pair: Servers, client: RolloutClient, folders: list[Path]) -> None:
    """One story, because starting servers is what costs time."""
    first, second = pair.all
    with pytest.raises(ServerError, match=r"ignore the temperature.*--logprobs-mode processed_logprobs"):
        client.check_logprob_contract()

    through_host = pair.cfg
    pair.cfg = dataclasses.replace(through_host, transport="collective")
    with WeightSync(folder_pieces(folders[1]), pair.cfg, pair) as sync:
        # Experts are packed anew at the first push and at the second. A slow server is waited for.
        with before("stream", sync, lambda: stop_for(second, 1.0)):
            assert sync.push(1).failed == {}
        assert_serve(client, folders[1], 1, [first, second])
    pair.cfg = through_host
    with WeightSync(folder_pieces(folders[0]), pair.cfg, pair) as sync:
        assert sync.push(2).failed == {}
        assert_serve(client, folders[0], 2, [first, second])

        # Stopped while it generates: its requests are asked elsewhere.
        group_signal(second, signal.SIGSTOP)
        assert_serve(client, folders[0], 2, [first])
        assert "/health did not answer" in second.unusable

        # Stopped before it received anything: left out at the deadline, on the weights that it had; when it goes on it
        # is not asked before it is brought up, although it begins the old update by then.
        second.unusable = None
        patient, pair.cfg = pair.cfg, dataclasses.replace(pair.cfg, sync_timeout_s=8)
        report = sync.push(3)
        assert list(report.failed) == [second.name]
        assert "phase start" in report.failed[second.name]
        assert "did not answer within 8 s; it keeps version 2" in report.failed[second.name]
        group_signal(second, signal.SIGCONT)
        assert_serve(client, folders[0], 3, [first])
        assert sync.bring_up() == [second.name]
        assert_serve(client, folders[0], 3, [first, second])

        # Stopped while it loads: nobody knows what it holds, and it is never asked again, though it goes on.
        with before("load", sync, lambda: group_signal(second, signal.SIGSTOP)):
            report = sync.push(4)
        pair.cfg = patient
        assert "phase load" in report.failed[second.name]
        group_signal(second, signal.SIGCONT)
        assert sync.bring_up() == []
        assert "unknown weights" in second.unusable
        assert_serve(client, folders[0], 4, [first])

        # Killed before a push, which goes to the one that is left; started anew, and brought up before it is asked,
        # even where that was a training's first push, version 0.
        group_signal(second, signal.SIGKILL)
        second.process.wait()
        pair.cfg = dataclasses.replace(through_host, transport="collective")
        with WeightSync(folder_pieces(folders[1]), pair.cfg, pair) as stream:
            assert stream.push(0).failed == {}
            (second,) = pair.revive()
            assert pair.usable() == [first]
            pair.wait_ready()
            assert_serve(client, folders[1], 0, [first])
            assert stream.bring_up() == [second.name]
            assert_serve(client, folders[1], 0, [first, second])

            # Killed while the weights stream into both: the other one gets them anew, in a group without it.
            with before("stream", stream, lambda: group_signal(first, signal.SIGKILL)):
                report = stream.push(6)
            assert "phase stream" in report.failed[first.name]
            assert "unknown weights" in first.unusable
            assert_serve(client, folders[1], 6, [second])
        pair.cfg = through_host

        # Killed after a push, while it generates, and nobody is left: errors that say so, with the end of the log.
        with ThreadPoolExecutor(1) as pool:
            long = dataclasses.replace(SAMPLING, max_new_tokens=400)
            running = pool.submit(client.complete_tokens, PROMPTS, long, seed=0)
            time.sleep(0.2)
            group_signal(second, signal.SIGKILL)
            with pytest.raises(ServerError, match="no server is left to generate"):
                running.result()
        with pytest.raises(NoServerError, match=r"push of version 7(?s:.*)whole log: "):
            sync.push(7)


_PHASES = {
    "collective": ("init", "pause", "start", "workers", "meet", "stream", "finish", "cache", "check", "resume"),
    "shm": (own := ("init", "start", "receive", "pause", "load", "finish", "cache", "check", "resume")),
    "tcp": own,
}


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "phase"), [(name, phase) for name in _PHASES for phase in _PHASES[name]])
def test_a_server_killed_in_any_phase_is_left_out(
    transport: str, phase: str, fork_servers, folders: list[Path], tmp_path: Path
) -> None:
    cfg = dataclasses.replace(CONFIG, transport=transport)
    with fork_servers(cfg, folders[0], tmp_path) as servers:
        first, second = servers.all
        with WeightSync(folder_pieces(folders[1]), cfg, servers) as sync:
            with before(phase, sync, lambda: group_signal(second, signal.SIGKILL)):
                report = sync.push(1)
            assert list(report.failed) == [second.name]
            assert f"phase {phase}" in report.failed[second.name]
            assert sync.push(2).failed == {}
        with RolloutClient(servers, NoText(), vocab_size=320) as client:
            assert_serve(client, folders[1], 2, [first])


def test_a_server_lost_in_a_push_is_not_believed_what_it_holds(
    server: Servers, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `rollout.urls`, so nobody starts it anew: it took the version, and its prefix cache is of the old weights."""

    def fail(one: Server) -> None:
        raise ServerError(f"server {one.name}: the prefix cache of the old weights could not be reset")

    monkeypatch.setenv("T1_SERVER_KEY", server.all[0].key)
    cfg = RolloutConfig(urls=(server.all[0].url,), device="cpu", sync_timeout_s=60)
    given = Servers(cfg, tiny_dir, tmp_path).start().wait_ready()
    with WeightSync(folder_pieces(tiny_dir), cfg, given) as sync:
        version = sync.next_version()
        with monkeypatch.context() as patched:
            patched.setattr(sync._fanout, "_reset_cache", fail)
            with pytest.raises(NoServerError, match="phase cache"):
                sync.push(version)
        (again,) = given.revive()
        given.wait_ready()
        assert again.call("GET", "/weight_info", timeout_s=60)["weight_version"] == str(version)
        assert given.usable() == []
        assert sync.bring_up() == [again.name]
        assert given.usable() == [again]
    server.all[0].introduce()  # another list pushed into it
    server.required_version = version


@pytest.mark.parametrize("transport", ["shm", "tcp", "collective"])
def test_a_server_that_somebody_starts_anew_at_its_url_gets_the_weights(
    transport: str, fork_servers, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `rollout.urls`, between two pushes: nobody says so, and it is healthy all the time that it is looked at."""
    with reserve_port("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    started = dataclasses.replace(CONFIG, num_servers=1, ports=(port,))
    with fork_servers(started, folders[0], tmp_path) as servers:
        monkeypatch.setenv("T1_SERVER_KEY", servers.all[0].key)
        cfg = RolloutConfig(urls=(servers.all[0].url,), device="cpu", transport=transport, sync_timeout_s=60)
        given = Servers(cfg, folders[0], tmp_path).start().wait_ready()
        sync = WeightSync(folder_pieces(folders[1]), cfg, given)
        assert sync.push(1).failed == {}
    with sync, fork_servers(started, folders[0], tmp_path):
        with contextlib.suppress(NoServerError):
            sync.push(2)
        given.revive()
        given.wait_ready(minimum=1)
        sync.bring_up()
        with RolloutClient(given, NoText(), vocab_size=320) as client:
            assert_serve(client, folders[1], 2, given.all)


def test_a_server_announced_in_the_middle_is_brought_up_before_it_is_asked(
    server: Servers, tiny_dir: Path, tmp_path: Path
) -> None:
    """The trainer's list of servers grows while it runs: here by one that runs already, and holds other weights."""
    cfg = RolloutConfig(await_servers=1, key_file=str(server.run_dir / "server_key"), device="cpu", transport="shm")
    other = make_tiny_qwen2(tmp_path / "other", seed=77)
    registry = Registry(cfg.registry_folder(tmp_path))
    joined = Servers(cfg, tiny_dir, tmp_path).start()
    with WeightSync(folder_pieces(other), cfg, joined) as sync:
        with pytest.raises(NoServerError, match="no server is alive"):
            sync.push(401)
        held: list[int] = []
        assert sync.bring_up(lambda: held.append(0)) == [], "the trainer's weights may be away: they are not asked for"
        registry.announce("late", server.all[0].url, server.all[0].log_path)
        joined.poll()
        assert [one.url for one in joined.alive()] == [server.all[0].url]
        assert joined.usable() == []
        assert sync.bring_up(lambda: held.append(joined.all[0].version)) == [server.all[0].name]
        assert len(held) == 1
        assert held[0] != 401, "nothing is pushed before"
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    with RolloutClient(joined, NoText(), vocab_size=320) as client:
        ((sample,),) = client.complete_tokens(PROMPTS[:1], dataclasses.replace(SAMPLING, num_samples=1), seed=0)
    expected = reference.logprobs(model, PROMPTS[0], sample.token_ids.tolist(), SAMPLING.temperature)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
    assert sample.weight_versions == ((401, 0, len(sample.token_ids)),)
    server.all[0].introduce()  # another list pushed into it
    server.required_version = 401
