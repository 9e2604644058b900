"""Pushes from several trainer processes, whatever their layout; and a trainer rank that dies in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.rollout.config import RolloutConfig
from megatron_t1.rollout.server import Servers
from tests.tiny import make_tiny_qwen2
from tests.weights import reference, trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_tiny_qwen2(tmp_path_factory.mktemp(f"weights{seed}"), seed=seed) for seed in (101, 102)]


def run_trainer(server: Servers, tmp_path: Path, world_size: int, pushes: list, *, joins: bool = True) -> list[dict]:
    cfg = RolloutConfig(
        urls=(server.all[0].url,), key_file=str(server.run_dir / "server_key"), device="cpu", sync_timeout_s=20
    )
    args = (world_size, tmp_path / "store", cfg, pushes, tmp_path / "out.json")
    context = torch.multiprocessing.spawn(trainer.train, args, nprocs=world_size, join=False)
    if joins:
        context.join(timeout=200)
    else:  # a rank kills itself: spawn's own join would kill the others
        for process in context.processes:
            process.join(timeout=100)
    last = max(version for layout, _, version in pushes if layout != "killed")
    server.all[0].version = server.required_version = last  # pushed by others than this fixture's owner
    return json.loads((tmp_path / "out.json").read_text())


def assert_transformers_agrees(result: dict, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for token_ids, logprobs, versions, _ in result["samples"]:
        expected = reference.logprobs(model, trainer.PROMPT, token_ids, trainer.SAMPLING.temperature)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        assert versions == [[result["version"], 0, len(token_ids)]]


def test_tensor_and_pipeline_parallel_trainers_and_a_killed_rank(
    server: Servers, tmp_path: Path, folders: list[Path]
) -> None:
    pushes = [
        ("tp2", folders[0], 201),
        ("pp2", folders[1], 202),
        ("gloo", folders[0], 203),
        ("killed", folders[1], 204),
    ]
    results = run_trainer(server, tmp_path, 2, pushes, joins=False)
    for result, folder in zip(results, [*folders, folders[0]], strict=True):
        assert_transformers_agrees(result, folder)
    message = (tmp_path / "out.error").read_text()
    assert "phase write: trainer rank 1" in message
    # No server was touched by the push that lost its rank.
    assert server.all[0].call("GET", "/weight_info", timeout_s=5) == {"weight_version": "203"}


def test_four_ranks_of_tensor_and_pipeline_parallelism(server: Servers, tmp_path: Path, folders: list[Path]) -> None:
    (result,) = run_trainer(server, tmp_path, 4, [("tp2pp2", folders[0], 301)])
    assert_transformers_agrees(result, folders[0])
