"""`t1 sync-check` against a live server: right weights, other weights, a model that is not the trainer's, and a server
that keeps an old copy of one tensor."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.push import sync_check as sync_check_module
from megatron_t1.push.perturb import perturbed
from megatron_t1.push.ranks import NoServerError
from megatron_t1.push.sync import PushReport, WeightSync, folder_pieces
from megatron_t1.push.sync_check import SyncCheck, sync_check
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from megatron_t1.types import TrainSequence
from tests.push import reference
from tests.tiny import make_tiny_qwen2


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2(tmp_path_factory.mktemp("other"), seed=31)


def push(folder: Path, server: Servers) -> None:
    with WeightSync(folder_pieces(folder), server.cfg, server) as sync:
        sync.push(sync.next_version())


def check(folder: Path, server: Servers, model: torch.nn.Module, perturb: bool = False) -> SyncCheck:
    """As the command does it, with transformers in place of the trainer's forward pass.

    `folder`: what is pushed; with `perturb` it is `model`, whose own numbers are changed.
    """

    def logprobs(sequences: list[TrainSequence]) -> list[np.ndarray]:
        return [reference.logprobs(model, s.prompt_ids, s.response_ids, 1.0).numpy() for s in sequences]

    pieces = reference.whole(reference.tensors_of(model)) if perturb else folder_pieces(folder)
    # Of a Megatron model the pieces are views; those of `whole` are copies.
    for piece, parameter in zip(pieces, model.parameters(), strict=True) if perturb else ():
        object.__setattr__(piece, "view", parameter.data)
    with WeightSync(pieces, server.cfg, server) as sync:
        return sync_check(
            sync, logprobs, vocab_size=320, max_tokens=512, tolerance=1e-3, perturb=pieces if perturb else None
        )


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


def test_changed_weights_are_taken_and_put_back(server: Servers, tiny_dir: Path) -> None:
    model = model_of(tiny_dir)
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    push(tiny_dir, server)
    before = server.all[0].version
    found = check(tiny_dir, server, model, perturb=True)
    assert verdicts(found) == {"ok"}, found.table()
    assert max(row.changed for row in found.rows) < found.changed_tolerance(server.all[0].name) < 1e-4
    assert min(row.effect for row in found.rows) > 0.1
    assert {row.moved for row in found.rows} == {0.0}
    assert server.all[0].version == found.report.version == before + 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[name]), name
    assert verdicts(check(tiny_dir, server, model)) == {"ok"}


@pytest.mark.parametrize("blow", ["Ctrl-C", "an error", "a push that no server took"])
def test_the_old_weights_come_back_whatever_happens(
    server: Servers, tiny_dir: Path, blow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the servers hold changed weights: a signal waits, an error comes after they are back."""
    model = model_of(tiny_dir)
    push(tiny_dir, server)
    version = server.all[0].version
    calls: list[int] = []
    ask, push_of = sync_check_module._ask, WeightSync.push

    def struck(*arguments: Any) -> Any:
        calls.append(server.all[0].version)
        if len(calls) == 2:
            if blow == "an error":
                raise RuntimeError("struck")
            os.kill(os.getpid(), signal.SIGINT)
        return ask(*arguments)

    def refused(sync: WeightSync, number: int) -> PushReport:
        report = push_of(sync, number)
        if number == version + 1:
            raise NoServerError("struck")
        return report

    monkeypatch.setattr(sync_check_module, "_ask", struck)
    if blow == "a push that no server took":
        monkeypatch.setattr(WeightSync, "push", refused)
    with pytest.raises(
        KeyboardInterrupt if blow == "Ctrl-C" else RuntimeError, match=None if blow == "Ctrl-C" else "struck"
    ):
        check(tiny_dir, server, model, perturb=True)
    monkeypatch.undo()
    assert calls == [version, version + 1][: 1 if "push" in blow else 2]
    assert server.all[0].version == version + 2
    assert verdicts(check(tiny_dir, server, model)) == {"ok"}


def test_a_server_that_keeps_a_packed_copy_is_found_by_changed_weights_alone(
    fork_servers: Callable[..., AbstractContextManager[Servers]], tiny_dir: Path, tmp_path: Path
) -> None:
    """vLLM's CPU build packs a tied head once; this server is without the mend that packs it anew."""
    cfg = RolloutConfig(
        device="cpu",
        dtype="float32",
        max_model_len=512,
        sync_timeout_s=60,
        vllm_args={"worker-extension-cls": "tests.push.forgetful.Forgetful"},
    )
    model = model_of(tiny_dir)
    with fork_servers(cfg, tiny_dir, tmp_path) as forgetful:
        assert verdicts(check(tiny_dir, forgetful, model)) == {"ok"}
        found = check(tiny_dir, forgetful, model, perturb=True)
        assert verdicts(found) == {"KEPT old weights"}, found.table()
        assert found.wrong == [forgetful.all[0].name]
        assert {row.moved for row in found.rows} == {0.0}


def test_a_change_is_the_same_in_every_cut_and_leaves_no_number() -> None:
    draw = torch.Generator().manual_seed(3)
    tensors = {
        "a.q_proj.weight": torch.randn(8, 6, generator=draw),
        "a.o_proj.weight": torch.randn(4, 6, generator=draw),
        "norm.weight": torch.zeros(64),
        "a.q_proj.bias": torch.randn(8, generator=draw).bfloat16(),
    }
    whole = {piece.name: piece for piece in reference.whole(tensors)}
    with perturbed(list(whole.values())):
        for name, piece in whole.items():
            assert (piece.view.view(piece.shape) != tensors[name]).all(), name
            assert piece.view.unique().numel() > 1, name
        for rank in (0, 1):
            cut = reference.tensor_parallel(tensors, rank, 2)
            with perturbed(cut):
                for piece in cut:
                    expected = whole[piece.name].view.view(piece.shape)[piece.index].view(piece.view.shape)
                    assert torch.equal(piece.view, expected), piece.name
    for name, piece in whole.items():
        assert torch.equal(piece.view.view(piece.shape), tensors[name]), name


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
    code, output, errors = command("--parallel.nproc_per_node", 2, "--parallel.tensor", 2, "--perturb")
    assert code == 1, errors
    assert output.count(f"\n{name} ") == output.count("held OTHER weights before") == 4, errors
    code, output, errors = command()
    assert code == 0, errors
    assert output.count("  ok\n") == 4
    assert f"as version {held + 3} in" in output
    # Others pushed, so this process has to look again.
    server.all[0].introduce()
    assert server.all[0].version == held + 3
    server.required_version = held + 3
