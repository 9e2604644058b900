"""Two real servers of a mixture-of-experts model that are killed, stopped and started anew around weight pushes.

They return raw logprobs, so that the check of the temperature contract has a real server to refuse; the samples that
are held against transformers are drawn at temperature 1, where raw and processed are the same.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import RolloutConfig, SamplingConfig
from megatron_t1.rollout.server import Server, ServerError, Servers, open_servers
from megatron_t1.weights.fanout import SyncError
from megatron_t1.weights.sync import WeightSync, folder_pieces
from tests.tiny import make_tiny_qwen3_moe
from tests.weights import reference
from tests.weights.trainer import NoText

PROMPTS = [[40 + i, 50, 60, 70] for i in range(8)]
SAMPLING = SamplingConfig(temperature=1.0, num_samples=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_tiny_qwen3_moe(tmp_path_factory.mktemp(f"moe{seed}"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def pair(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    cfg = RolloutConfig(
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
    with open_servers(cfg, folders[0], tmp_path_factory.mktemp("pair")) as servers:
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


def test_pushes_through_kills_stops_and_restarts(pair: Servers, client: RolloutClient, folders: list[Path]) -> None:
    """One story, because starting servers is what costs time."""
    first, second = pair.all
    with pytest.raises(ServerError, match=r"ignore the temperature.*--logprobs-mode processed_logprobs"):
        client.check_logprob_contract()

    with WeightSync(folder_pieces(folders[1]), pair.cfg, pair) as sync:
        # Experts are packed anew at the first push and at the second.
        assert sync.push(1).failed == {}
        assert_serve(client, folders[1], 1, [first, second])
    with WeightSync(folder_pieces(folders[0]), pair.cfg, pair) as sync:
        assert sync.push(2).failed == {}
        assert_serve(client, folders[0], 2, [first, second])

        # A server that is stopped while it generates: its requests are asked elsewhere.
        group_signal(second, signal.SIGSTOP)
        assert_serve(client, folders[0], 2, [first])
        assert "/health did not answer" in second.unusable

        # ... and while it is pushed into: it is left out at the deadline, the other one goes on.
        second.unusable = None
        pair.cfg = dataclasses.replace(pair.cfg, sync_timeout_s=5)
        report = sync.push(3)
        pair.cfg = dataclasses.replace(pair.cfg, sync_timeout_s=30)
        assert list(report.failed) == [second.name]
        assert "phase pause" in report.failed[second.name]
        assert "did not answer within" in report.failed[second.name]
        group_signal(second, signal.SIGCONT)
        assert_serve(client, folders[0], 3, [first])  # alive again, but not on the current weights

        # Killed: the push goes to the one that is left; the dead one is started anew and brought up before it is asked.
        group_signal(second, signal.SIGKILL)
        second.process.wait()
        assert sync.push(4).failed == {}
        (second,) = pair.revive()
        assert pair.usable() == [first]
        pair.wait_ready()
        assert_serve(client, folders[0], 4, [first])
        assert sync.bring_up() == [second]
        assert_serve(client, folders[0], 4, [first, second])

        # The engine of one dies in the middle of an update: the other one goes on.
        fanout, update = sync._fanout, sync._fanout.update_weights

        def kill_then_update(info: dict) -> None:
            group_signal(first, signal.SIGKILL)
            update(info)

        fanout.update_weights = kill_then_update
        report = sync.push(5)
        assert "phase update" in report.failed[first.name]
        assert_serve(client, folders[0], 5, [second])

        # Nobody is left: an error that says so, with the end of the log.
        group_signal(second, signal.SIGKILL)
        with pytest.raises(SyncError, match=r"push of version 6(?s:.*)whole log: "):
            sync.push(6)
        with pytest.raises(ServerError, match="no server is left to generate"):
            client.complete_tokens(PROMPTS, SAMPLING, seed=0)
