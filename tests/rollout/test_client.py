"""The client against a real vLLM server, held to transformers; and against servers that lie, drop or refuse."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.rollout import client as client_module
from megatron_t1.rollout.client import NoServerLeftError, RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import UNPUSHED, Server, ServerError
from megatron_t1.servers.servers import Servers
from megatron_t1.types import Prompt, Reward, Sample
from tests.hostile import good_reply, serving
from tests.push import reference

SAMPLING = SamplingConfig(temperature=1.2, num_samples=5, max_new_tokens=12)


def prompt(i: int, length: int = 4) -> Prompt:
    return Prompt(id=f"p{i}", text="", token_ids=np.arange(40 + i, 40 + i + length) % 256, gold="")


@pytest.fixture(scope="module")
def client(server: Servers, tiny_dir: Path):
    with WeightSync(folder_pieces(tiny_dir), server.cfg, server) as sync:
        sync.push((server.required_version or 0) + 1)
    with RolloutClient(server, AutoTokenizer.from_pretrained(tiny_dir), vocab_size=320) as client:
        yield client


TINY_PROMPT = dataclasses.replace(prompt(0), token_ids=np.array([1]))  # fits the vocabulary of 9 of lying servers


def test_a_server_says_how_full_its_cache_is(server: Servers) -> None:
    usage = server.all[0].cache_usage()
    assert usage is not None
    assert 0 <= usage <= 1


def ids_of(groups) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in group.samples] for group in groups]


def test_logprobs_are_transformers_at_the_sampling_temperature(client: RolloutClient, tiny_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    for group in client.generate([prompt(0), prompt(1)], SAMPLING, seed=3):
        assert len(group.samples) == 5
        for sample in group.samples:
            expected = reference.logprobs(model, group.prompt.token_ids.tolist(), sample.token_ids.tolist(), 1.2)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert sample.text == client.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            assert sample.finish_reason in ("stop", "length")
    client.check_logprob_contract()


def test_samples_are_distinct_and_the_same_however_they_are_asked_for(client: RolloutClient) -> None:
    prompts = [prompt(0), prompt(0), prompt(2)]
    once = ids_of(client.generate(prompts, SAMPLING, seed=3))
    assert len({tuple(ids) for group in once[:2] for ids in group}) == 10  # the same prompt twice gets other seeds
    client.cfg = dataclasses.replace(client.cfg, samples_per_request=2)
    assert ids_of(client.generate(prompts, SAMPLING, seed=3)) == once
    assert ids_of(client.generate(prompts, SAMPLING, seed=4)) != once


def test_samples_are_scored_while_others_generate(client: RolloutClient) -> None:
    running, most = 0, 0

    async def score(_: Prompt, sample) -> Reward:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.05)
        running -= 1
        return Reward(value=float(len(sample.token_ids)), correct=True, outcome="correct", extracted=None, reason="")

    groups = client.generate([prompt(i) for i in range(4)], SAMPLING, score, seed=1)
    assert all(s.reward is not None and s.reward.value == len(s.token_ids) for g in groups for s in g.samples)
    assert most > 1


def test_an_error_in_scoring_is_raised_as_it_is(client: RolloutClient) -> None:
    async def score(*_) -> Reward:
        raise ZeroDivisionError("grader")

    with pytest.raises(ZeroDivisionError, match="grader"):
        client.generate([prompt(0)], SAMPLING, score, seed=1)


def test_what_a_server_cuts_at_its_own_context_is_no_sample(client: RolloutClient, monkeypatch) -> None:
    monkeypatch.setattr(client.servers.all[0], "max_model_len", 4096)  # as of one that came later, with less
    sampling = dataclasses.replace(SAMPLING, num_samples=16, max_new_tokens=400)
    with pytest.raises(ServerError, match="cut after 212 of 400 tokens, by a shorter max_model_len"):
        client.generate([prompt(0, length=300)], sampling, seed=1)


def test_greedy_continuations_are_those_of_transformers(client: RolloutClient, tiny_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    prefixes = [[5, 6, 7], [100, 101], [9] * 20]
    greedy = SamplingConfig(temperature=0, num_samples=1, max_new_tokens=6)
    results = client.complete_tokens(prefixes, greedy, seed=0)
    for prefix, (sample,) in zip(prefixes, results, strict=True):
        expected = model.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=6)[0, len(prefix) :]
        assert sample.token_ids.tolist() == expected.tolist()


def test_top_k_leaves_the_most_likely_tokens(client: RolloutClient, tiny_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    prefix = [5, 6, 7]
    likely = model(torch.tensor([prefix])).logits[0, -1].topk(3).indices.tolist()
    first = {k: set() for k in (1, 3, 0)}
    for k, seen in first.items():
        cut = SamplingConfig(temperature=1.2, top_k=k, num_samples=64, max_new_tokens=1)
        (samples,) = client.complete_tokens([prefix], cut, seed=0)
        seen.update(int(sample.token_ids[0]) for sample in samples)
    assert first[1] == {likely[0]}
    assert first[3] <= set(likely)
    assert len(first[3]) > 1
    assert not first[0] <= set(likely)


def test_a_stop_string_ends_a_response(client: RolloutClient) -> None:
    (free,) = client.complete_tokens([[5, 6, 7]], dataclasses.replace(SAMPLING, num_samples=1), seed=2)
    text = free[0].text
    stop = next(c for c in text[1:] if c.isascii() and c.isprintable())
    own = dataclasses.replace(SAMPLING, num_samples=1, stop=(stop,))
    (cut,) = client.complete_tokens([[5, 6, 7]], own, seed=2)
    assert cut[0].finish_reason == "stop"
    assert cut[0].token_ids.tolist() == free[0].token_ids.tolist()[: len(cut[0].token_ids)]
    assert stop in cut[0].text
    assert stop not in client.tokenizer.decode(cut[0].token_ids[:-1], skip_special_tokens=True)


def test_a_prompt_that_does_not_fit_is_named(client: RolloutClient) -> None:
    with pytest.raises(ValueError, match=r"p1: 510 prompt .*max_new_tokens = 12 exceed .*max_model_len = 512"):
        client.generate([prompt(0), prompt(1, length=510)], SAMPLING, seed=0)
    with pytest.raises(ValueError, match=r"p0: token ids must be in \[0, 320\)"):
        client.generate([dataclasses.replace(prompt(0), token_ids=np.array([320]))], SAMPLING, seed=0)


class NoText:
    def decode(self, token_ids, skip_special_tokens=False) -> str:
        return ""


@contextlib.contextmanager
def client_of(*urls: str, monkeypatch: pytest.MonkeyPatch, **options):
    monkeypatch.setenv("T1_SERVER_KEY", "k")
    with Servers(RolloutConfig(urls=urls, device="cpu", **options), "", "") as servers:
        with RolloutClient(
            servers.start().wait_ready(), type("T", (), {"decode": lambda *_, **__: ""})(), vocab_size=9
        ) as c:
            yield c


def _set(path: list, value):
    def change(reply):
        at = reply["choices"][0]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return reply

    return change


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda reply: b"<html>", "JSON is malformed.*begins b'<html>'"),
        (lambda reply: b"[1, 2]", "Expected `object`, got `array`"),
        (lambda reply: {"choices": None}, "choices"),
        (lambda reply: {"choices": reply["choices"][:1]}, "p0: 1 samples, not 2"),
        (_set(["token_ids"], [7, 9]), "outside the vocabulary"),
        (_set(["token_ids"], [7, -1]), "outside the vocabulary"),
        (_set(["token_ids"], [7, 8, 8]), "3 tokens"),
        (_set(["token_ids"], [7] * 99), "99 tokens, not 1 to 12"),
        (_set(["token_ids"], []), "0 tokens, not 1 to 12"),
        (_set(["token_ids"], ["a", "b"]), "Expected `int`, got `str`.*token_ids"),
        (_set(["token_ids"], [2**70, 1]), "too large|out of range"),
        (_set(["token_ids"], None), "Expected `array`, got `null`.*token_ids"),
        (_set(["logprobs", "content", 0, "logprob"], float("nan")), "JSON is malformed"),
        (_set(["logprobs", "content", 0, "logprob"], -1e300), "finite"),
        (_set(["logprobs", "content", 0, "logprob"], -9999.0), "finite"),  # vLLM's word for NaN
        (_set(["logprobs", "content", 0, "logprob"], 0.5), "finite number at or below 0"),
        (_set(["logprobs", "content", 0, "logprob"], None), "Expected `float`, got `null`.*logprob"),
        (_set(["logprobs", "content", 0, "token_id"], 3), "of other tokens"),
        (_set(["logprobs"], None), "Expected `object`, got `null`.*logprobs"),
        (_set(["finish_reason"], "error"), "finish_reason"),
        (_set(["finish_reason"], "length"), "cut after 2 of 12 tokens, by a shorter max_model_len"),
        (_set(["weight_versions"], []), "do not cover"),
        (_set(["weight_versions", 0, "end"], 1), "do not cover"),
        (_set(["weight_versions", 0, "version"], "7"), "version 7, it should hold what it started with"),
        (_set(["weight_versions", 0, "version"], "x"), "which is no number"),
        (_set(["index"], "x"), "Expected `int`, got `str`.*index"),
    ],
)
def test_a_reply_that_lies_is_refused_and_the_server_named(lie, message: str, monkeypatch) -> None:
    sampling = dataclasses.replace(SAMPLING, num_samples=2)
    with serving(lambda request: lie(good_reply(request))) as url:
        with client_of(url, monkeypatch=monkeypatch) as client:
            with pytest.raises(ServerError, match=f"(?s){url.removeprefix('http://')}.*{message}"):
                client.generate([TINY_PROMPT], sampling, seed=0)


def test_a_server_that_drops_connections_is_asked_again_then_left(monkeypatch) -> None:
    asked = []

    def flaky(request):
        asked.append(request)
        return (None, 503, good_reply(request))[min(len(asked) - 1, 2)]

    sampling = dataclasses.replace(SAMPLING, num_samples=2)
    prompts = [TINY_PROMPT] * 3
    with serving(flaky) as url, client_of(url, monkeypatch=monkeypatch) as client:
        assert len(client.generate(prompts, sampling, seed=0)) == 3
    with serving(lambda request: None) as bad, serving(good_reply) as good:
        with client_of(bad, good, monkeypatch=monkeypatch, connect_retries=1) as client:
            groups = client.generate(prompts, sampling, seed=0)
            assert {s.server for g in groups for s in g.samples} == {good}
            assert "connection errors" in client.servers.all[0].unusable
    with serving(lambda request: None) as bad, client_of(bad, monkeypatch=monkeypatch, connect_retries=2) as client:
        with pytest.raises(ServerError, match=r"no server is left to generate:\n.*is unusable: 2 connection errors"):
            client.generate(prompts, sampling, seed=0)


def test_an_error_in_another_encoding_is_one_like_others(monkeypatch) -> None:
    sampling = dataclasses.replace(SAMPLING, num_samples=2)
    said = "d\xe9lai".encode("latin-1")
    with serving(lambda request: (502, said)) as proxy, serving(good_reply) as good:
        with client_of(proxy, good, monkeypatch=monkeypatch, connect_retries=1) as client:
            groups = client.generate([TINY_PROMPT] * 3, sampling, seed=0)
            assert {s.server for g in groups for s in g.samples} == {good}
            assert "502: d\ufffdlai" in client.servers.all[0].unusable
    with serving(lambda request: (400, said)) as url, client_of(url, monkeypatch=monkeypatch) as client:
        with pytest.raises(ServerError, match="refused: 400: d\ufffdlai"):
            client.generate([TINY_PROMPT], sampling, seed=0)


@contextlib.contextmanager
def server_that_hangs():
    """It listens, and nobody accepts: as a process that was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Server(url=f"http://127.0.0.1:{listening.getsockname()[1]}", key="k", ready=True, max_model_len=512)


def test_a_connection_that_does_not_come_about_is_tried_again(monkeypatch) -> None:
    """As of a host whose queue is full, or that drops packets for a moment."""
    monkeypatch.setattr(client_module, "_CONNECT_TIMEOUT_S", 0.2)
    with serving(good_reply) as good, socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        with client_of(good, monkeypatch=monkeypatch, connect_retries=2) as client:
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            lost = Server(url=url, key="k", ready=True, max_model_len=512)
            client.servers.all.insert(0, lost)
            groups = client.generate([TINY_PROMPT], dataclasses.replace(SAMPLING, num_samples=2), seed=0)
    assert {s.server for g in groups for s in g.samples} == {good}
    assert lost.unusable.startswith("2 connection errors, the last one: ConnectionTimeoutError")


def test_the_pause_between_attempts_does_not_grow_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(client_module, "_MAX_PAUSE_S", 0.001)
    asked = []

    def answer(request):
        asked.append(request)
        return good_reply(request) if len(asked) > 20 else 503

    with serving(answer) as url, client_of(url, monkeypatch=monkeypatch, connect_retries=99) as client:
        assert len(client.generate([TINY_PROMPT], dataclasses.replace(SAMPLING, num_samples=2), seed=0)) == 1


def _at_temperature(request):
    """Two tokens whose logits are 1 apart."""
    reply, temperature = good_reply(request), request["sampling_params"]["temperature"]
    top = [{"token_id": token, "logprob": -1 - token / temperature} for token in (0, 1)]
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
    return reply


def test_the_contract_is_checked_at_the_servers_that_are_left(monkeypatch) -> None:
    monkeypatch.setattr(client_module, "_WATCH_INTERVAL_S", 0.1)
    options = {"connect_retries": 2, "health_timeout_s": 0.3}
    with serving(lambda request: None) as bad, serving(_at_temperature) as good, server_that_hangs() as stuck:
        with client_of(bad, good, monkeypatch=monkeypatch, **options) as client:
            client.servers.all.insert(0, stuck)
            client.check_logprob_contract()
            assert "/health did not answer" in stuck.unusable
            assert "2 connection errors" in client.servers.all[1].unusable
            assert [server.url for server in client.servers.usable()] == [good]
            assert set(client.samples_in_flight().values()) == {0}
    with serving(lambda request: None) as bad, client_of(bad, monkeypatch=monkeypatch, connect_retries=1) as client:
        with pytest.raises(NoServerLeftError, match="no server is left"):
            client.check_logprob_contract()
    with serving(good_reply) as one_token, client_of(one_token, monkeypatch=monkeypatch) as client:
        with pytest.raises(ServerError, match="no two tokens' finite logprobs"):
            client.check_logprob_contract()


def test_logprobs_that_are_no_numbers_do_not_pass_for_processed_ones(monkeypatch) -> None:
    def broken(request):
        reply = good_reply(request)
        top = [{"token_id": token, "logprob": -9999.0} for token in (0, 1)]
        reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return reply

    with serving(broken) as url, client_of(url, monkeypatch=monkeypatch) as client:
        with pytest.raises(ServerError, match="no two tokens' finite logprobs"):
            client.check_logprob_contract()


def test_finished_samples_are_not_asked_again(tmp_path, monkeypatch) -> None:
    asked = []

    def answer(request):
        asked.append(request["sampling_params"]["seed"])
        return good_reply(request) if len(asked) <= 2 else None

    async def score(_: Prompt, sample) -> Reward:
        return Reward(value=0.5, correct=True, outcome="correct", extracted="7", reason="")

    sampling = dataclasses.replace(SAMPLING, num_samples=4)
    bank = Bank(tmp_path).step(3, "weights")
    options = {"samples_per_request": 2, "connect_retries": 1}
    with serving(answer) as url, client_of(url, monkeypatch=monkeypatch, **options) as client:
        with pytest.raises(NoServerLeftError):
            client.generate([TINY_PROMPT] * 2, sampling, score, seed=0, bank=bank)
    finished = asked[:2]
    asked.clear()
    with serving(lambda request: asked.append(request["sampling_params"]["seed"]) or good_reply(request)) as url:
        with client_of(url, monkeypatch=monkeypatch, samples_per_request=2) as client:
            bank = Bank(tmp_path).step(3, "weights")  # a new process
            groups = client.generate([TINY_PROMPT] * 2, sampling, score, seed=0, bank=bank)
            assert len(asked) == 2
            assert not set(asked) & set(finished)
            for sample in (sample for group in groups for sample in group.samples):
                assert sample.token_ids.tolist() == [7, 8]
                assert sample.logprobs.tolist() == [-1.0, -2.0]
                assert sample.weight_versions == ((UNPUSHED, 0, 2),)
                assert sample.reward.value == 0.5
            client.generate([TINY_PROMPT] * 2, sampling, score, seed=0, bank=Bank(tmp_path).step(3, "weights"))
            assert len(asked) == 2
            client.generate([TINY_PROMPT] * 2, sampling, score, seed=0, bank=Bank(tmp_path).step(3, "other weights"))
            assert len(asked) == 6
    Bank(tmp_path).drop_before(3)
    assert len(list(tmp_path.iterdir())) == 1
    Bank(tmp_path).drop_before(4)
    assert not list(tmp_path.iterdir())


def test_a_line_cut_by_a_kill_is_asked_again(tmp_path) -> None:
    sample = Sample(
        token_ids=np.array([7]), logprobs=np.array([-1], np.float32), text="", finish_reason="stop",
        weight_versions=((0, 0, 1),), server="",
    )  # fmt: skip
    bank = Bank(tmp_path).step(0, "weights")
    bank.add("a", [1], 5, [sample])
    bank.add("a", [1], 6, [sample])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    bank = Bank(tmp_path).step(0, "weights")
    assert bank.find([1], 5, 1) is not None
    assert bank.find([1], 6, 1) is None
    bank.add("a", [1], 6, [sample])
    assert Bank(tmp_path).step(0, "weights").find([1], 6, 1) is not None


def test_a_push_may_end_while_a_request_looks_for_a_server(monkeypatch) -> None:
    with serving(good_reply) as url, client_of(url, monkeypatch=monkeypatch) as client:
        servers, usable, looks = client.servers, client.servers.usable, []

        def look() -> list[Server]:
            looks.append(None)
            servers.pushing = len(looks) < 2
            return usable() if len(looks) > 2 else []

        monkeypatch.setattr(servers, "usable", look)
        assert client.complete_tokens([[1]], dataclasses.replace(SAMPLING, num_samples=1), seed=0)


def test_a_server_that_started_again_unnoticed_is_left(monkeypatch) -> None:
    sampling = dataclasses.replace(SAMPLING, num_samples=2)
    with serving(good_reply) as restarted, serving(_at_version("3")) as good:
        with client_of(restarted, good, monkeypatch=monkeypatch) as client:
            for server in client.servers.all:
                server.version = 3
            groups = client.generate([TINY_PROMPT] * 3, sampling, seed=0)
            assert {s.server for g in groups for s in g.samples} == {good}
            assert "started again meanwhile" in client.servers.all[0].unusable


def _at_version(version: str):
    def answer(request):
        reply = good_reply(request)
        for choice in reply["choices"]:
            choice["weight_versions"][0]["version"] = version
        return reply

    return answer


def test_a_server_that_never_answers_is_left_at_the_deadline(monkeypatch) -> None:
    def never(request):
        time.sleep(3)

    prompts = [TINY_PROMPT]
    with serving(never) as stuck, serving(good_reply) as good:
        with client_of(stuck, good, monkeypatch=monkeypatch, request_timeout_s=1.0) as client:
            groups = client.generate(prompts, dataclasses.replace(SAMPLING, num_samples=2), seed=0)
            assert {s.server for g in groups for s in g.samples} == {good}
            assert "request_timeout_s = 1 s" in client.servers.all[0].unusable


def test_a_wrong_key_is_said_at_the_start(server: Servers, monkeypatch) -> None:
    monkeypatch.setenv("T1_SERVER_KEY", "wrong")
    with pytest.raises(ServerError, match="401: the server's key is missing or wrong"):
        Servers(RolloutConfig(urls=(server.all[0].url,), device="cpu"), "", "").start().wait_ready()
