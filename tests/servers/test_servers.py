"""Starting, guarding and ending servers: with the real vLLM, and real processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.launch import end_group
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.servers.servers import Servers

ROUTES = [
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/invocations"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/collective_rpc"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/update_weight_version"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/server_info"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("OPTIONS", "/collective_rpc"),
    ("GET", "//health"),
    ("GET", "/health/../server_info"),
]


def status(url: str, method: str = "GET", **headers: str) -> int:
    request = urllib.request.Request(url, method=method, headers=headers, data=b"{}" if method == "POST" else None)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_is_open_without_the_key(server: Servers, method: str, path: str) -> None:
    url = server.all[0].url + path
    assert status(url, method) == 401
    assert status(url, method, Authorization="Bearer wrong") == 401
    assert status(url, method, Authorization=server.all[0].key) == 401


def test_health_and_metrics_are_open_on_loopback_only(server: Servers) -> None:
    one = server.all[0]
    assert status(one.url + "/health") == status(one.url + "/metrics") == 200
    port = int(one.url.rsplit(":", 1)[1])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {
        local.split(":")[0] for _, local, _, state, *_ in listening if state == "0A" and f":{port:04X}" in local
    }
    assert addresses == {"0100007F"}


def test_the_key_is_in_no_command_line_and_no_log(server: Servers) -> None:
    one = server.all[0]
    assert one.key not in repr(server.all)
    assert one.key not in one.log_path.read_text()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert one.key not in (process / "cmdline").read_text()
        except OSError:
            continue
    assert (server.run_dir / "server_key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"weight_vers',
    ],
    ids=["no HTTP", "headers cut off", "body cut off"],
)
def test_a_broken_answer_is_an_error_of_the_server(answer: bytes) -> None:
    """As of a server that is killed while it answers, or of another program on its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_all() -> None:
            with contextlib.suppress(OSError):  # until it is closed
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=answer_all, daemon=True).start()
        server = Server(url=f"http://127.0.0.1:{listening.getsockname()[1]}", key="k")
        with pytest.raises(ServerError, match=r"127\.0\.0\.1:\d+: /weight_info: \w+"):
            server.call("GET", "/weight_info", timeout_s=5)
        assert not server.hangs(timeout_s=5)
        assert server.cache_usage() is None
        with pytest.raises(ServerError):
            server.introduce()


def test_a_port_in_use_is_said_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} .*can't be taken.*leave rollout.ports empty"):
            Servers(RolloutConfig(ports=(port,), device="cpu"), tiny_dir, tmp_path).start()


@pytest.mark.usefixtures("open_servers")
def test_a_server_that_does_not_start_shows_why(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(ServerError, match="has no config\\.json"):
        Servers(RolloutConfig(device="cpu"), model, tmp_path).start()
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "no_such_model", "max_position_embeddings": 64}))
    with Servers(RolloutConfig(device="cpu"), model, tmp_path) as servers:
        servers.start()  # does not wait: else it would raise this itself
        with pytest.raises(ServerError, match=r"(?s)ended while starting.*whole log: .*server_0.log.*no_such_model"):
            servers.wait_ready()
    assert (tmp_path / "logs/server_0.log").read_text().count("ended by itself") == 1, "not started again"


@pytest.mark.usefixtures("open_servers")
def test_a_server_that_is_killed_while_it_starts_is_started_again(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Servers(RolloutConfig(device="cpu", max_model_len=64), tiny_dir, tmp_path) as servers:
        supervisor = servers.start().all[0].process
        assert supervisor is not None
        victims = psutil.Process(supervisor.pid).children()
        deadline = time.monotonic() + 300
        while not victims and time.monotonic() < deadline:
            victims = psutil.Process(supervisor.pid).children()
        victims[0].kill()
        servers.wait_ready()
        assert len(servers.alive()) == 1
    assert "was killed and is started again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_servers": 0}, "num_servers = 0 must be at least 1"),
        ({"request_timeout_s": 0}, "request_timeout_s = 0 must be above 0"),
        ({"num_servers": 2, "ports": (1,)}, r"ports = \[1\] must be one for each of the 2"),
        ({"urls": ("localhost:8000",)}, "must start with http"),
        ({"tp": 2, "gpu_ids": (0,)}, r"gpu_ids = \[0\] must be 2 GPUs"),
        ({"tp": 2, "gpu_ids": (3, 3)}, r"gpu_ids = \[3, 3\] must be numbers from 0 on, different ones"),
        ({"max_model_len": 0}, "max_model_len = 0 must be at least 2"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes = 0 must be at least 1"),
        ({"num_servers": 2, "ports": (8000, 8000)}, r"ports = \[8000, 8000\] must be different"),
        ({"ports": (65536,)}, r"ports = \[65536\] must be .* from 1 to 65535"),
        ({"urls": ("http://a:1", "http://a:1/")}, r"urls = .* must name each server once"),
        ({"urls": ("http://a:1/v1/",)}, r"urls = .* must be base URLs: http://a:1$"),
        ({"urls": ("http://[::1]:8000",)}, r"urls = .* must have an IPv4 address or a host name"),
        ({"urls": ("http://:8000",)}, r"urls = .* must have an IPv4 address or a host name"),
        ({"host": "::1"}, "host = '::1' must be an IPv4 address, a host name, or auto"),
        ({"vllm_args": {"port": 8000}}, "vllm_args.port = 8000 must be left out: rollout.ports says it"),
        ({"vllm_args": {"max_num_seqs": 8}}, "vllm_args.max_num_seqs = 8 must be left out: rollout.max_num_seqs says"),
    ],
)
def test_a_bad_config_names_the_field(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)


def test_a_bad_sampling_config_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"top_p = 0.0 must lie in \(0, 1\]"):
        SamplingConfig(top_p=0.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_memory_of_a_group_is_free_when_its_end_is_said() -> None:
    hold = "import os, time\nif not os.fork():\n    held = bytearray(1 << 30)\n    print(flush=True)\ntime.sleep(600)"
    leader = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    assert leader.stdout.readline()
    (child,) = psutil.Process(leader.pid).children()
    end_group(leader)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("victim", ["starter", "server", "supervisor"])
def test_no_process_of_a_server_outlives_a_kill(tmp_path: Path, victim: str) -> None:
    """A stand-in with vLLM's shape: a server process with an engine process below it, started by a trainer."""
    pids = tmp_path / "pids"
    engine = "import time; time.sleep(600)"
    server = (
        f"import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', '{engine}']);"
        f"open({str(pids)!r} + '.tmp', 'w').write(f'{{os.getppid()}} {{os.getpid()}} {{p.pid}}');"
        f"os.rename({str(pids)!r} + '.tmp', {str(pids)!r}); time.sleep(600)"
    )
    starter = (
        "import os, subprocess, sys, time; subprocess.Popen("
        "[sys.executable, '-m', 'megatron_t1.servers.die_with_parent',"
        f" str(os.getpid()), sys.executable, '-c', {server!r}], start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    try:
        deadline = time.monotonic() + 300
        while not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        supervisor_pid, server_pid, engine_pid = map(int, pids.read_text().split())
        os.kill({"starter": process.pid, "server": server_pid, "supervisor": supervisor_pid}[victim], signal.SIGKILL)
        # Nobody is left to end the engine of a killed supervisor but `Servers.close`, which ends the group.
        expected_dead = [server_pid] if victim == "supervisor" else [supervisor_pid, server_pid, engine_pid]
        while any(alive(pid) for pid in expected_dead) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in expected_dead)
    finally:
        process.kill()
        process.wait()
        for pid in map(int, pids.read_text().split()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
