"""The chat client against a real HTTP server that limits, stalls, fails and answers garbage."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.rollout import chat_endpoint
from megatron_t1.rollout.chat_endpoint import ChatEndpoint, EndpointError, NoAnswerError, RefusedError, Reply
from megatron_t1.rollout.config import EndpointConfig
from tests.scripted import TROUBLES, ScriptedEndpoint, serving


def echo(body: dict[str, Any]) -> str:
    return f"{body['messages'][-1]['content']}!"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask_all(cfg: EndpointConfig, texts: list[str], **options: Any) -> tuple[list[Any], ChatEndpoint]:
    """Replies (or the exceptions), and the client as it was at the end."""

    async def main() -> tuple[list[Any], ChatEndpoint]:
        async with ChatEndpoint(cfg) as endpoint:
            asked = (endpoint.ask(user(text), max_new_tokens=9, **options) for text in texts)
            return await asyncio.gather(*asked, return_exceptions=True), endpoint

    return asyncio.run(main())


def test_every_kind_of_trouble_is_ridden_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 requests, each in trouble up to twice: all are answered, with the right text, once."""
    monkeypatch.setattr(chat_endpoint, "_MAX_PAUSE_S", 0.2)
    texts = [f"question {i}" for i in range(300)]
    with serving(ScriptedEndpoint(echo, trouble=0.5)) as server:
        replies, client = ask_all(EndpointConfig(urls=(server.url,), timeout_s=3.0, max_in_flight=64), texts)
    assert [reply.text for reply in replies] == [f"{text}!" for text in texts]
    assert set(server.troubles) == set(TROUBLES)
    late = client.events["timeout"] - server.troubles["stall"]  # on a loaded machine a good answer may be late too
    assert server.served.total() - len(server.served) <= late
    assert client.events["rate limited"] == server.troubles["limit"] + server.troubles["limit date"]
    assert server.most_in_flight <= 64


def test_thousands_are_in_flight_and_a_rate_limit_thins_them_out() -> None:
    with serving(ScriptedEndpoint(echo, crowd=1001)) as server:
        replies, _ = ask_all(
            EndpointConfig(urls=(server.url + "/v1/",), max_in_flight=3000), [str(i) for i in range(3000)]
        )
        assert all(isinstance(reply, Reply) for reply in replies)
        assert server.most_in_flight > 1000  # else nobody had been answered
    with serving(ScriptedEndpoint(echo, trouble=0.3)) as server:
        _, client = ask_all(EndpointConfig(urls=(server.url,), timeout_s=3.0), [f"q{i}" for i in range(30)])
        assert client._gate.limit < 1024


def test_a_request_that_can_not_be_answered_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedEndpoint(lambda body: "REFUSE" if "long" in str(body) else "ok")) as server:
        (refused, fine), _ = ask_all(EndpointConfig(urls=(server.url,)), ["long", "short"])
    assert isinstance(refused, RefusedError)
    assert "this is too long" in str(refused)
    assert "a request was refused with 400: " in capsys.readouterr().err
    assert fine.text == "ok"
    (gone,), _ = ask_all(EndpointConfig(urls=(server.url,), max_retries=0), ["x"])
    assert isinstance(gone, NoAnswerError)
    assert "no answer after 1 attempts" in str(gone)


def test_the_first_failure_of_each_kind_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    gone = EndpointConfig(urls=("http://127.0.0.1:9",), model="M", max_retries=1)
    ask_all(gone, ["x", "y"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: M at http://127.0.0.1:9/v1/chat/completions: Cannot connect to host")
    assert "asking again, 1 times a request at most" in line
    with serving(ScriptedEndpoint(echo, delay_s=2.0)) as server:
        ask_all(EndpointConfig(urls=(server.url,), timeout_s=0.2, max_retries=0), ["x"])
    assert f"policy at {server.url}/v1/chat/completions: timeout" in capsys.readouterr().err


def test_the_key_comes_from_a_private_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text("secret\n")
    with pytest.raises(ValueError, match="readable by others"):
        EndpointConfig(urls=("http://x",), key_file=str(path)).key()
    path.chmod(0o600)
    with pytest.raises(ValueError, match="no such variable"):
        EndpointConfig(urls=("http://x",), key_env="T1_TEST_KEY").key()
    monkeypatch.setenv("T1_TEST_KEY", "secret")
    with serving(ScriptedEndpoint(echo, key="secret")) as server:
        for source in ({"key_file": str(path)}, {"key_env": "T1_TEST_KEY"}):
            (reply,), client = ask_all(EndpointConfig(urls=(server.url,), **source), ["x"])
            assert reply.text == "x!"
            assert "secret" not in repr(client.cfg)
        (wrong,), _ = ask_all(EndpointConfig(urls=(server.url,)), ["x"])
    assert isinstance(wrong, EndpointError)
    assert not isinstance(wrong, NoAnswerError)
    assert "mend the URL, the model's name or the key" in str(wrong)


def test_requests_say_what_was_asked_for_and_nothing_else() -> None:
    bodies: list[dict[str, Any]] = []
    with serving(ScriptedEndpoint(lambda body: bodies.append(body) or "ok")) as server:
        cfg = EndpointConfig(urls=(server.url,), model="m", extra_body={"reasoning_effort": "high"})
        ask_all(cfg, ["x"])
        ask_all(cfg, ["x"], temperature=0.5, top_p=0.9, top_k=20, seed=3, stop=("a",))
    plain = {"model": "m", "messages": user("x"), "max_tokens": 9, "temperature": 1.0, "reasoning_effort": "high"}
    assert bodies == [plain, {**plain, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "seed": 3, "stop": ["a"]}]


def test_an_answer_that_ended_at_once_is_empty_and_no_garbage() -> None:
    reply: dict[str, Any] = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    with pytest.raises(chat_endpoint._GarbageError):
        chat_endpoint._parse(reply, "")
    assert chat_endpoint._parse(reply | {"usage": {"prompt_tokens": 5, "completion_tokens": 1}}, "").text == ""


def test_a_prefill_is_continued_and_a_thinking_apart_is_put_back() -> None:
    reply = {"choices": [{"message": {"content": "b", "reasoning_content": "t"}, "finish_reason": "stop"}]}
    parsed = chat_endpoint._parse(reply, "a")
    assert (parsed.text, parsed.num_tokens) == ("a<think>t</think>b", 0)
    bodies: list[dict[str, Any]] = []

    async def main(url: str) -> Reply:
        async with ChatEndpoint(EndpointConfig(urls=(url,))) as endpoint:
            return await endpoint.ask([*user("x"), {"role": "assistant", "content": "so "}], max_new_tokens=5)

    with serving(ScriptedEndpoint(lambda body: bodies.append(body) or "far")) as server:
        assert asyncio.run(main(server.url)).text == "so far"
    assert (bodies[0]["add_generation_prompt"], bodies[0]["continue_final_message"]) == (False, True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0", 0.1),
        (None, 1.0),
        ("soon", 1.0),
        ("1e99", 900.0),
        ("nan", 1.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.1),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", 1.0),
    ],
)
def test_retry_after(header: str | None, seconds: float) -> None:
    assert chat_endpoint._retry_after_s(header) == seconds


def test_a_reply_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_endpoint, "_MAX_REPLY_BYTES", 1000)
    with serving(ScriptedEndpoint(lambda body: "x" * 2000)) as server:
        (reply,), client = ask_all(EndpointConfig(urls=(server.url,), max_retries=0), ["x"])
    assert isinstance(reply, NoAnswerError)
    assert client.events == {"requests": 1, "GarbageError": 1}


def parsed(message: dict[str, Any], finish: Any = "stop") -> Reply:
    return chat_endpoint._parse({"choices": [{"message": message, "finish_reason": finish}]}, "")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "b"}],
            "<think>t</think>b",
        ),
        ([{"type": "reasoning", "text": "t"}, {"type": "output_text", "text": "b"}], "<think>t</think>b"),
        ([{"type": "thinking", "thinking": "t"}], "<think>t</think>"),
    ],
)
def test_content_in_parts_is_put_together(content: Any, text: str) -> None:
    assert parsed({"content": content}).text == text


@pytest.mark.parametrize(
    "content", [["a"], [{"type": "image_url"}], [{"type": "text", "text": 3}], {"text": "a"}, 3, [[]], []]
)
def test_content_that_is_no_text_is_asked_for_again(content: Any) -> None:
    with pytest.raises(chat_endpoint._GarbageError):
        parsed({"content": content})


@pytest.mark.parametrize(
    ("finish", "told"),
    [("eos", "stop"), (None, "stop"), ("end_turn", "stop"), ("max_tokens", "length"), ("length", "length")],
)
def test_an_ending_is_understood_in_other_spellings(finish: Any, told: str) -> None:
    assert parsed({"content": "a"}, finish).finish_reason == told


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        ({"content": None}, "content_filter"),
        ({"content": "half an ans"}, "content_filter"),
        ({"content": None}, "tool_calls"),
        ({"content": None, "refusal": "I can't help with that"}, "stop"),
        ({"content": None, "refusal": "no \ud83d"}, "stop"),
        ({"content": None}, "\ud83d"),
    ],
)
def test_an_answer_that_would_not_come_another_time_is_a_refusal(message: dict[str, Any], finish: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parsed(message, finish)
    str(refused.value).encode()  # evaluation writes it down


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, {"max_tokens": 9}),
        ({"max_tokens_field": "max_completion_tokens"}, {"max_completion_tokens": 9}),
        ({"max_tokens_field": ""}, {}),
        ({"extra_body": {"max_tokens": None, "max_completion_tokens": 99}}, {"max_completion_tokens": 99}),
    ],
)
def test_the_limit_is_sent_in_the_field_that_the_endpoint_takes(options: dict[str, Any], limits: dict) -> None:
    bodies: list[dict[str, Any]] = []
    with serving(ScriptedEndpoint(lambda body: bodies.append(body) or "ok")) as server:
        ask_all(EndpointConfig(urls=(server.url,), **options), ["x"])
    assert {name: value for name, value in bodies[0].items() if name.startswith("max")} == limits
    assert "" not in bodies[0]


def test_endpoints_are_asked_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "proxy:3129")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    proxies = {
        "https://api.example/v1": "http://proxy:3128",
        "http://api.example/v1": "http://proxy:3129",
        "http://inside.example/v1": None,
        "http://127.0.0.1:8000": None,
        "http://localhost:8000": None,
    }
    assert {url: chat_endpoint._proxy_of(url) for url in proxies} == proxies
    assert set(ChatEndpoint(EndpointConfig(urls=("http://10.0.0.1",)), direct=True)._proxies.values()) == {None}
    (reply,), _ = ask_all(EndpointConfig(urls=("http://api.example",), max_retries=0), ["x"])
    assert "proxy:3129" in str(reply)
