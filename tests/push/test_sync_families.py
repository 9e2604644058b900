"""Every family that vLLM serves, from Megatron ranks on every layout into one and two servers: the servers say what
transformers says of the weights that the trainer exports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import Server
from megatron_t1.servers.servers import Servers
from tests.models.families import FAMILIES, MOE, VOCAB
from tests.push import reference
from tests.workers.family_trainer import Push, Trainers
from tests.workers.trainer import NoText

# Family -> fields of its config.json: vLLM's CPU attention has heads of 32, 64, 80, ... numbers. Tied embeddings, where
# vLLM's CPU build needs a mend, are pushed in test_sync.py.
SERVED: dict[str, dict[str, int]] = {
    "qwen2": {}, "qwen3": {"head_dim": 64}, "qwen3_moe": {}, "glm": {}, "glm4": {}, "glm4_moe": {},
}  # fmt: skip
TP2_SERVER = "qwen2"
"""The family whose second server is tensor parallel itself."""


def layouts(family: str) -> dict[str, tuple[dict[str, object], int]]:
    """Name -> fields of ParallelConfig for four ranks, number of servers."""
    moe = family in MOE
    return {
        "TP2": ({"tensor": 2, "sequence_parallel": True, "expert": 2 if moe else 1}, 1),
        "PP2": ({"pipeline": 2, "expert": 2} if moe else {"pipeline": 2, "virtual_pipeline": 2}, 2),
        "TP2 PP2": ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 2),
    }


PROMPTS = [[40, 50, 60, 70], list(range(200))]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    started = Trainers()
    yield started
    started.close()


def start_pair(stack: ExitStack, folder: Path, run_dir: Path, tps: tuple[int, int]) -> list[tuple[Servers, Server]]:
    opened = []
    for index, tp in enumerate(tps):
        cfg = RolloutConfig(
            device="cpu", dtype="float32", max_model_len=512, tp=tp, key_file=str(run_dir / "key"), sync_timeout_s=120
        )
        opened.append(stack.enter_context(Servers(cfg, folder, run_dir / str(index))).start())
    return [(servers, servers.wait_ready().all[0]) for servers in opened]


@pytest.mark.parametrize("family", SERVED)
def test_servers_say_what_transformers_says(family: str, trainers: Trainers, tmp_path: Path) -> None:
    folders = [FAMILIES[family](tmp_path / f"seed{seed}", seed=seed, **SERVED[family]) for seed in range(4)]
    with ExitStack() as stack:
        pair = start_pair(stack, folders[0], tmp_path, (1, 2 if family == TP2_SERVER else 1))
        for version, (layout, (fields, num_servers)) in enumerate(layouts(family).items(), start=1):
            targets = pair[:num_servers]
            cfg = RolloutConfig(
                urls=tuple(server.url for _, server in targets),
                key_file=str(tmp_path / "key"),
                device="cpu",
                sync_timeout_s=120,
            )
            export = tmp_path / "export" / layout
            trainers.push(Push(folder=folders[version], fields=fields, cfg=cfg, version=version, export=export))
            model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
            for servers, server in targets:
                server.introduce()  # pushed by other processes than the one that started it
                assert_serves(servers, model, version, layout)


def assert_serves(servers: Servers, model: torch.nn.Module, version: int, layout: str) -> None:
    with RolloutClient(servers, NoText(), vocab_size=VOCAB) as client:
        answers = client.complete_tokens(PROMPTS, SAMPLING, seed=version)
    for prompt, samples in zip(PROMPTS, answers, strict=True):
        for sample in samples:
            expected = reference.logprobs(model, prompt, sample.token_ids.tolist(), SAMPLING.temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-3, err_msg=layout)
            assert sample.weight_versions == ((version, 0, len(sample.token_ids)),)
