"""A trainer rank that dies in a push, by every transport, after pushes that went well."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.servers.servers import Servers
from tests.forks import WORKERS, Forks
from tests.push import reference
from tests.tiny import make_tiny_qwen2
from tests.workers import trainer

TRAINER = WORKERS / "trainer.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_tiny_qwen2(tmp_path_factory.mktemp(f"weights{seed}"), seed=seed) for seed in (101, 102)]


@pytest.fixture
def run_trainer(forks: Forks, server: Servers, tmp_path: Path) -> Callable[..., list[dict]]:
    """Two ranks, the last push of which one of them does not survive; what the server said after those before it."""

    def run(pushes: list[tuple[str, Path, int]]) -> list[dict]:
        fields = {
            "urls": [server.all[0].url],
            "key_file": str(server.run_dir / "server_key"),
            "device": "cpu",
            "sync_timeout_s": 20,
        }
        given = json.dumps([(layout, str(folder), version) for layout, folder, version in pushes])
        log = tmp_path / "log"
        ranks = forks.start(TRAINER, json.dumps(fields), given, tmp_path / "out.json", num_ranks=2, stderr=log)
        codes = [rank.wait(200) for rank in ranks]
        assert codes == [0, -signal.SIGKILL], log.read_text()
        server.all[0].introduce()  # pushed by others than this fixture's owner
        server.required_version = server.all[0].version
        return json.loads((tmp_path / "out.json").read_text())

    return run


def assert_says(samples: list[list], folder: Path, version: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for token_ids, logprobs, versions in samples:
        expected = reference.logprobs(model, trainer.PROMPT, token_ids, trainer.SAMPLING.temperature)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        assert [list(span) for span in versions] == [[version, 0, len(token_ids)]]


def test_a_rank_killed_before_it_has_written(run_trainer, server: Servers, tmp_path: Path, folders: list[Path]) -> None:
    pushes = [("tp2", folders[0], 201), ("pp2", folders[1], 202), ("killed", folders[0], 203)]
    results = run_trainer(pushes)
    for result, (_, folder, version) in zip(results, pushes[:2], strict=True):
        assert_says(result["samples"], folder, version)
    assert "phase write: trainer rank 1" in (tmp_path / "out.error").read_text()
    # No server was touched by the push that lost its rank.
    assert server.all[0].version == 202


def test_a_rank_killed_while_it_sends(run_trainer, server: Servers, tmp_path: Path, folders: list[Path]) -> None:
    pushes = [("tp2 tcp", folders[0], 211), ("pp2 tcp", folders[1], 212), ("killed in tcp", folders[0], 213)]
    results = run_trainer(pushes)
    for result, (_, folder, version) in zip(results, pushes[:2], strict=True):
        assert_says(result["samples"], folder, version)
    message = (tmp_path / "out.error").read_text()
    assert "phase receive" in message
    assert "trainer rank 1 at 127.0.0.1:" in message
    assert "it keeps version 212" in message
    # So it does, is not paused, and takes the next push.
    with RolloutClient(server, trainer.NoText(), vocab_size=320) as client:
        (samples,) = client.complete_tokens([trainer.PROMPT], trainer.SAMPLING, seed=0)
        assert_says([[s.token_ids.tolist(), s.logprobs, s.weight_versions] for s in samples], folders[1], 212)
    with WeightSync(folder_pieces(folders[0]), server.cfg, server) as sync:
        assert sync.push(214).failed == {}


def test_a_rank_killed_while_it_broadcasts(run_trainer, server: Servers, tmp_path: Path, folders: list[Path]) -> None:
    layouts = ("tp2 collective", "pp2 collective", "killed in collective")
    pushes = [(layout, folders[i % 2], 221 + i) for i, layout in enumerate(layouts)]
    results = run_trainer(pushes)
    for result, (_, folder, version) in zip(results, pushes[:2], strict=True):
        assert_says(result["samples"], folder, version)
    assert "trainer rank 1 ended or was silent" in (tmp_path / "out.error").read_text()
    # The server holds a part of the new weights: the next trainer, whatever its transport, pushes all of them.
    with WeightSync(folder_pieces(folders[1]), server.cfg, server) as sync:
        assert sync.push(224).failed == {}
    with RolloutClient(server, trainer.NoText(), vocab_size=320) as client:
        (samples,) = client.complete_tokens([trainer.PROMPT], trainer.SAMPLING, seed=0)
    assert_says([[s.token_ids.tolist(), s.logprobs, s.weight_versions] for s in samples], folders[1], 224)
