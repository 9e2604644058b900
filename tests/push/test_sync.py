"""Weight pushes into a real vLLM server, held against transformers on the same weights."""

from __future__ import annotations

import dataclasses
import itertools
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_t1.push import transports
from megatron_t1.push.group import Group, GroupError, Invitation, Wait
from megatron_t1.push.ranks import NoServerError, SyncError
from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.servers import Servers
from tests.push import reference
from tests.tiny import make_tiny_qwen2

PROMPT = [40, 50, 60, 70]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


def model_of(tiny_dir: Path, seed: int) -> torch.nn.Module:
    """A model of the served shape with other numbers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture
def client(server: Servers, tiny_dir: Path):
    with RolloutClient(server, AutoTokenizer.from_pretrained(tiny_dir), vocab_size=320) as client:
        yield client


def assert_serves(client: RolloutClient, model: torch.nn.Module, version: int) -> None:
    for sample in client.complete_tokens([PROMPT], SAMPLING, seed=version)[0]:
        expected = reference.logprobs(model, PROMPT, sample.token_ids.tolist(), SAMPLING.temperature)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
        assert sample.weight_versions == ((version, 0, len(sample.token_ids)),)


def test_two_pushes_of_a_tied_model_each_take_effect(server: Servers, client: RolloutClient, tiny_dir: Path) -> None:
    # The second push, and the tied head, are where vLLM's CPU build silently keeps old numbers.
    model = model_of(tiny_dir, seed=1)
    with WeightSync(reference.whole(reference.tensors_of(model)), server.cfg, server) as sync:
        report = sync.push(11)
        assert report.failed == {}
        assert report.num_bytes >= sum(p.numel() * 4 for p in model.parameters())
        assert_serves(client, model, 11)
        with torch.no_grad():
            for piece, parameter in zip(sync.plan.mine(), model.parameters(), strict=True):
                parameter.mul_(1.1)
                piece.view.copy_(parameter.view(piece.view.shape))
        sync.push(12)
    assert_serves(client, model, 12)


def test_weights_may_change_once_begin_push_returned(server: Servers, client: RolloutClient, tiny_dir: Path) -> None:
    model = model_of(tiny_dir, seed=2)
    pieces = reference.whole(reference.tensors_of(model))
    with WeightSync(pieces, server.cfg, server) as sync:
        sync.begin_push(21)
        for piece in pieces:
            piece.view.zero_()
        sync.finish_push()
    assert_serves(client, model, 21)


def test_a_changed_byte_is_refused_and_the_old_weights_stay(
    server: Servers, client: RolloutClient, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model_of(tiny_dir, seed=3)
    with WeightSync(reference.whole(reference.tensors_of(old)), server.cfg, server) as sync:
        sync.push(31)
    with WeightSync(reference.whole(reference.tensors_of(model_of(tiny_dir, seed=4))), server.cfg, server) as sync:
        name = "model.layers.1.mlp.down_proj.weight"
        transport, deliver = sync._transport, sync._transport.deliver
        offset = next(tensor.offset for tensor in sync.layout.tensors if tensor.name == name)

        def corrupt(*args) -> None:
            transport.file.buffer[offset + 4097] ^= 1
            deliver(*args)

        monkeypatch.setattr(transport, "deliver", corrupt)
        with pytest.raises(SyncError, match=rf"(?s)phase receive.*{name} \(from rank 0\).*keeps version 31"):
            sync.push(32)
        assert server.usable() == []  # version 31 is whole, but not what was asked for
        server.required_version = 31
        assert_serves(client, old, 31)
        monkeypatch.undo()
        sync.push(32)
    assert_serves(client, model_of(tiny_dir, seed=4), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update({"model.extra.weight": torch.zeros(4)}), "model.extra.weight is unknown"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(4)}), r"model.norm.weight is \(4,\), served"),
    ],
)
def test_another_models_weights_are_refused_before_they_are_sent(server: Servers, tiny_dir: Path, change, message):
    tensors = reference.tensors_of(model_of(tiny_dir, seed=5))
    change(tensors)
    with WeightSync(reference.whole(tensors), server.cfg, server) as sync:
        with pytest.raises(SyncError, match=rf"(?s)phase init.*{message}"):
            sync.push(51)
    assert all(one.unusable is None for one in server.all)


def test_a_folder_is_pushed_by_one_process(server: Servers, client: RolloutClient, tmp_path: Path) -> None:
    folder = make_tiny_qwen2(tmp_path / "other", seed=7)
    with WeightSync(folder_pieces(folder), server.cfg, server) as sync:
        sync.push(61)
    assert_serves(client, AutoModelForCausalLM.from_pretrained(folder), 61)


@pytest.mark.parametrize("transport", ["tcp", "collective"])
def test_the_same_by_other_transports(
    transport: str, server: Servers, client: RolloutClient, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_dir, seed=8)
    monkeypatch.setattr(server, "cfg", dataclasses.replace(server.cfg, transport=transport))
    with WeightSync(reference.whole(reference.tensors_of(model)), server.cfg, server) as sync:
        version = sync.next_version()
        sync.push(version)
        assert_serves(client, model, version)
        assert sync.push(version + 1).failed == {}
    assert_serves(client, model, version + 1)


def test_a_stream_that_breaks_is_sent_anew_by_another_group(
    server: Servers, client: RolloutClient, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is left with a part of the new weights, packed copies and tied head included."""
    model = model_of(tiny_dir, seed=12)
    monkeypatch.setattr(server, "cfg", dataclasses.replace(server.cfg, transport="collective"))
    monkeypatch.setattr(transports, "Invitation", partial(Invitation, bucket_bytes=16 << 10))
    with WeightSync(reference.whole(reference.tensors_of(model)), server.cfg, server) as sync:
        broadcast, count = Group.broadcast, itertools.count()

        def breaks_once(group: Group, *args: Any) -> Wait:
            if next(count) == 5:
                group.close()
            return broadcast(group, *args)

        monkeypatch.setattr(Group, "broadcast", breaks_once)
        version, joins = sync.next_version(), itertools.count()
        assert sync.push(version).failed == {}
        assert next(count) > 10
        assert_serves(client, model, version)

        def comes_the_second_time(*args: Any) -> Group:
            if next(joins) == 0:
                raise GroupError("not at the first meeting")
            return Group(*args)

        monkeypatch.setattr(transports, "Group", comes_the_second_time)
        sync._transport.close()
        assert sync.push(version + 1).failed == {}
        assert next(joins) == 2

        # Numbers that change after their digests were made are refused at the end, and the server is not asked again.
        deliver = sync._transport.deliver

        def corrupted(*args: Any) -> None:
            sync._transport._views[-1][0].add_(1)
            deliver(*args)

        monkeypatch.setattr(sync._transport, "deliver", corrupted)
        with pytest.raises(NoServerError, match=r"(?s)phase stream.*model.norm.weight \(from rank 0\)"):
            sync.push(version + 2)
        assert "unknown weights" in server.all[0].unusable
        server.all[0].unusable = None
        monkeypatch.setattr(sync._transport, "deliver", deliver)
        assert sync.push(version + 2).failed == {}


@pytest.mark.parametrize("mode", ["wait", "abort", "keep"])
def test_requests_in_flight_follow_the_stated_rule(
    server: Servers, client: RolloutClient, tiny_dir: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, newer = model_of(tiny_dir, seed=9), model_of(tiny_dir, seed=10)
    with WeightSync(reference.whole(reference.tensors_of(model)), server.cfg, server) as sync:
        old = sync.next_version()
        sync.push(old)
    monkeypatch.setattr(server, "cfg", dataclasses.replace(server.cfg, pause_mode=mode))
    with WeightSync(reference.whole(reference.tensors_of(newer)), server.cfg, server) as sync:
        long = SamplingConfig(temperature=1.2, num_samples=64, max_new_tokens=400)
        done_before = num_generated(server)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.complete_tokens, [PROMPT], long, seed=0)
            while num_generated(server) < done_before + 500:
                time.sleep(0.02)
            sync.push(old + 1)
            samples = running.result()[0]
    spans = {sample.weight_versions for sample in samples}
    seen = {version for span in spans for version, _, _ in span}
    if mode == "wait":
        assert seen == {old}
    elif mode == "abort":
        assert seen == {old + 1}  # asked again on the new weights, but for those that were done
    else:
        assert any(len(span) == 2 for span in spans)
        for sample in (s for s in samples if len(s.weight_versions) == 2):
            # Each token is of the weights that its span says, on a cache recomputed with them.
            ids = sample.token_ids.tolist()
            cut = sample.weight_versions[0][2]
            before = reference.logprobs(model, PROMPT, ids, 1.2)
            after = reference.logprobs(newer, PROMPT, ids, 1.2)
            np.testing.assert_allclose(sample.logprobs, torch.cat([before[:cut], after[cut:]]), atol=1e-3)


def test_the_prefix_cache_of_the_old_weights_is_gone(
    server: Servers, client: RolloutClient, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_dir, seed=11)
    # In this mode vLLM keeps its cache over a pause: only our own reset empties it.
    monkeypatch.setattr(server, "cfg", dataclasses.replace(server.cfg, pause_mode="keep"))
    prompt = list(range(290))  # fills two blocks of the cache
    for _ in range(2):
        hits = counter(server, "vllm:prefix_cache_hits_total")
        client.complete_tokens([prompt], SAMPLING, seed=0)
    assert counter(server, "vllm:prefix_cache_hits_total") > hits
    with WeightSync(reference.whole(reference.tensors_of(model)), server.cfg, server) as sync:
        sync.push(sync.next_version())
    for sample in client.complete_tokens([prompt], SAMPLING, seed=0)[0]:
        expected = reference.logprobs(model, prompt, sample.token_ids.tolist(), SAMPLING.temperature)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_a_server_left_paused_by_a_dead_trainer_answers_the_next_one(server: Servers, client: RolloutClient) -> None:
    one = server.all[0]
    one.call("POST", "/pause?mode=wait", timeout_s=60)
    one.introduce()
    assert client.complete_tokens([PROMPT], SAMPLING, seed=0)[0][0].weight_versions[0][0] == one.version


def counter(server: Servers, name: str) -> float:
    """A counter of the server's /metrics."""
    with urllib.request.urlopen(server.all[0].url + "/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def num_generated(server: Servers) -> float:
    """Tokens that the server has generated so far."""
    return counter(server, "vllm:generation_tokens_total")
