"""Every family that vLLM serves, from Megatron ranks on every layout into one and two servers: the servers say what
transformers says of the weights that the trainer exports."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from tests.forks import WORKERS
from tests.models.families import FAMILIES, MOE, VOCAB
from tests.push import reference
from tests.workers.trainer import NoText

# Family -> fields of its config.json: vLLM's CPU attention has heads of 32, 64, 80, ... numbers. Tied embeddings, where
# vLLM's CPU build needs a mend, are pushed in test_sync.py.
SERVED: dict[str, dict[str, int]] = {
    "qwen2": {}, "qwen3": {"head_dim": 64}, "qwen3_moe": {}, "glm": {}, "glm4": {}, "glm4_moe": {},
}  # fmt: skip
TP2_SERVER = "qwen2"
"""The family whose second server is tensor parallel itself."""


def layouts(family: str) -> dict[str, tuple[dict[str, object], int, str]]:
    """Name -> fields of ParallelConfig for four ranks, number of servers, transport."""
    moe = family in MOE
    return {
        "TP2": ({"tensor": 2, "sequence_parallel": True, "expert": 2 if moe else 1}, 1, "collective"),
        "PP2": ({"pipeline": 2, "expert": 2} if moe else {"pipeline": 2, "virtual_pipeline": 2}, 2, "collective"),
        "TP2 PP2": ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 2, "collective" if moe else "shm"),
    }


PROMPTS = [[40, 50, 60, 70], list(range(200))]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


@pytest.mark.parametrize("family", SERVED)
def test_servers_say_what_transformers_says(family: str, fork_servers, run_ranks, tmp_path: Path) -> None:
    folders = [FAMILIES[family](tmp_path / f"seed{seed}", seed=seed, **SERVED[family]) for seed in range(4)]
    key_file = str(tmp_path / "key")
    common = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "key_file": key_file, "sync_timeout_s": 120}
    with ExitStack() as stack:
        opened = []
        for index, tp in enumerate((1, 2 if family == TP2_SERVER else 1)):
            cfg = RolloutConfig(tp=tp, **common)
            opened.append(stack.enter_context(fork_servers(cfg, folders[0], tmp_path / str(index))))
        for version, (layout, (fields, num_servers, transport)) in enumerate(layouts(family).items(), start=1):
            targets = [(servers, servers.all[0]) for servers in opened[:num_servers]]
            export = tmp_path / "export" / layout
            push = {
                "folder": str(folders[version]),
                "fields": fields,
                "rollout": {**common, "urls": [server.url for _, server in targets], "transport": transport},
                "version": version,
                "export": str(export),
            }
            run_ranks(WORKERS / "family_trainer.py", 4, json.dumps(push))
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
