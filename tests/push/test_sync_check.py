"""`t1 sync-check` against a live server: right weights, other weights, and a model that is not the trainer's."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.push.sync_check import SyncCheck, sync_check
from megatron_t1.servers.servers import Servers
from tests.push import reference
from tests.tiny import make_tiny_qwen2


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2(tmp_path_factory.mktemp("other"), seed=31)


def push(folder: Path, server: Servers) -> None:
    with WeightSync(folder_pieces(folder), server.cfg, server) as sync:
        sync.push(sync.next_version())


def check(folder: Path, server: Servers, model: torch.nn.Module) -> SyncCheck:
    """As the command does it, with transformers in place of the trainer's forward pass."""

    def logprobs(pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        return [reference.logprobs(model, prompt, response, 1.0).numpy() for prompt, response in pairs]

    with WeightSync(folder_pieces(folder), server.cfg, server) as sync:
        return sync_check(sync, logprobs, vocab_size=320, max_tokens=512, tolerance=1e-3)


def model_of(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prefix_cache_hits(server: Servers) -> float:
    """Tokens of prompts that the server took from its prefix cache since it was started."""
    with urllib.request.urlopen(f"{server.all[0].url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def verdicts(result: SyncCheck) -> set[str]:
    return {result.verdict(row) for row in result.rows}


def test_a_server_with_other_weights_is_named_and_brought_to_the_right_ones(
    server: Servers, tiny_dir: Path, other_dir: Path
) -> None:
    push(other_dir, server)
    model = model_of(tiny_dir)
    found = check(tiny_dir, server, model)
    assert verdicts(found) == {"held OTHER weights before"}
    assert found.wrong == [server.all[0].name]
    # The same prompts as a moment ago: from the prefix cache they would come with sums of another order.
    hits = prefix_cache_hits(server)
    again = check(tiny_dir, server, model)
    assert prefix_cache_hits(server) == hits
    assert verdicts(again) == {"ok"}
    assert not again.wrong
    assert {row.moved for row in again.rows} == {0.0}
    assert server.all[0].version == again.report.version == found.report.version + 1


def test_a_server_that_computes_another_function_is_found_after_the_push(server: Servers, tiny_dir: Path) -> None:
    """The same names, shapes and bytes; only the server's config.json is not the trainer's."""
    model = model_of(tiny_dir)
    model.config.rope_parameters["rope_theta"] = 500.0
    model = type(model)(model.config).eval()
    model.load_state_dict(model_of(tiny_dir).state_dict())
    found = check(tiny_dir, server, model)
    assert verdicts(found) == {"WRONG after the push"}
    assert "WRONG after the push" in found.table()


@pytest.fixture
def command(start_t1, server: Servers, tiny_dir: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs it with some more options: its exit code, output and errors."""

    def run(*more: object) -> tuple[int, str, str]:
        options = {
            "model.hf_path": tiny_dir,
            "model.dtype": "float32",
            "rollout.urls": f"[{server.all[0].url}]",
            "rollout.key_file": server.run_dir / "server_key",
            "rollout.device": "cpu",
            "run_dir": tmp_path,
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        process = start_t1("sync-check", *words, *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=600)
        return process.returncode, output, errors

    return run


def test_the_command_checks_a_live_server_from_megatron_ranks(
    server: Servers, other_dir: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    push(other_dir, server)
    name, held = server.all[0].name, server.all[0].version
    code, output, errors = command("--parallel.nproc_per_node", 2, "--parallel.tensor", 2)
    assert code == 1, errors
    assert output.count(f"{name}") == output.count("held OTHER weights before") == 4, errors
    code, output, errors = command()
    assert code == 0, errors
    assert output.count("  ok\n") == 4
    assert f"as version {held + 2} in" in output
    # Others pushed, so this process has to look again.
    server.all[0].introduce()
    assert server.all[0].version == held + 2
    server.required_version = held + 2
