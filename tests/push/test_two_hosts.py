"""A server on another host, as far as the network can tell: `t1 serve` in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from tests.hostile import good_reply, serving
from tests.push import reference
from tests.tiny import make_tiny_qwen2
from tests.workers.trainer import NoText

PROMPT = [40, 50, 60, 70]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


@pytest.fixture
def other_host() -> Iterator[tuple[str, str]]:
    """A namespace and its address; our end of the wire is the .1 of the same network."""
    name, network = f"t1-{os.getpid()}", f"10.{os.getpid() % 256}.77"
    ours, theirs = f"t1a{os.getpid()}", f"t1b{os.getpid()}"
    commands = [
        f"netns add {name}",
        f"link add {ours} type veth peer name {theirs} netns {name}",
        f"addr add {network}.1/24 dev {ours}",
        f"link set {ours} up",
        f"-n {name} addr add {network}.2/24 dev {theirs}",
        f"-n {name} link set {theirs} up",
        f"-n {name} link set lo up",
    ]
    if not shutil.which("ip"):
        pytest.skip("no `ip` command here")
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        yield name, f"{network}.2"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_server_on_another_host_announces_itself_and_takes_weights(
    other_host: tuple[str, str], start_t1, tiny_dir: Path, tmp_path: Path
) -> None:
    namespace, host = other_host
    options = {
        "model.hf_path": tiny_dir, "run_dir": tmp_path, "rollout.host": host, "rollout.device": "cpu",
        "rollout.dtype": "float32", "rollout.max_model_len": 512,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    serve = start_t1("serve", *words, within=["ip", "netns", "exec", namespace])
    cfg = RolloutConfig(await_servers=1, device="cpu", sync_timeout_s=120)
    other = make_tiny_qwen2(tmp_path / "other", seed=5)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    try:
        with Servers(cfg, "", tmp_path) as servers:
            servers.start().wait_ready()
            assert servers.all[0].url.startswith(f"http://{host}:")
            with WeightSync(folder_pieces(other), cfg, servers) as sync:
                assert sync.push(1).failed == {}
            with RolloutClient(servers, NoText(), vocab_size=320) as client:
                (samples,) = client.complete_tokens([PROMPT], SAMPLING, seed=0)
    finally:
        serve.terminate()
        serve.wait(60)
    for sample in samples:
        expected = reference.logprobs(model, PROMPT, sample.token_ids.tolist(), SAMPLING.temperature)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
        assert sample.weight_versions == ((1, 0, len(sample.token_ids)),)


SILENT = """
import sys, time
from tests.hostile import serving
def answer(request):
    print("asked", flush=True)
    time.sleep(1000)
with serving(answer, sys.argv[1]) as url:
    print(url, flush=True)
    time.sleep(1000)
"""


def test_requests_at_a_host_that_lost_its_power_are_asked_elsewhere(
    other_host: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace, host = other_host
    words = ["ip", "netns", "exec", namespace, sys.executable, "-c", SILENT, host]
    silent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("T1_SERVER_KEY", "k")
    try:
        with serving(good_reply) as good, ThreadPoolExecutor(1) as pool:
            urls = (silent.stdout.readline().strip(), good)
            cfg = RolloutConfig(urls=urls, device="cpu", health_timeout_s=6, connect_retries=1)
            servers = Servers(cfg, "", "").start().wait_ready()
            with RolloutClient(servers, NoText(), vocab_size=9) as client:
                running = pool.submit(client.complete_tokens, [[1]] * 2, SAMPLING, seed=0)
                assert silent.stdout.readline() == "asked\n"
                subprocess.run(["ip", "-n", namespace, "link", "set", f"t1b{os.getpid()}", "down"], check=True)
                try:
                    results = running.result(timeout=100)
                finally:
                    client.cancel()
            assert {sample.server for samples in results for sample in samples} == {good}
    finally:
        silent.kill()
        silent.wait()
