"""Readers of what servers and endpoints answer."""

from __future__ import annotations

import asyncio
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_t1 import logprobs
from megatron_t1.rollout import chat_endpoint, reply
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers import server as servers
from megatron_t1.servers.server import UNPUSHED, Server, ServerError
from megatron_t1.types import Sample, TrainSequence
from tests.fuzz.reader import Reader, check_ids, is_text, json_damage, must
from tests.hostile import good_reply


class Words:
    """A tokenizer that is quick."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def reply_readers(tmp: Path) -> list[Reader]:
    server = Server(url="http://host:1", key="k")
    request = reply.Request("question a", [1, 2], 2, 0, SamplingConfig(max_new_tokens=4, num_samples=2))
    generated = good_reply({"sampling_params": {"n": 2}})
    chat = {
        "choices": [
            {"message": {"role": "assistant", "content": "4", "reasoning_content": "x"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    parts = {
        "choices": [
            {
                "message": {"content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "4"}]},
                "finish_reason": None,
            }
        ]
    }
    scored = {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -2.5}}]}]}
    text = TrainSequence(prompt_ids=np.array([1]), response_ids=np.array([2, 3]))
    models = {"data": [{"id": "m", "max_model_len": 512}]}

    def check_samples(samples: list[Sample]) -> None:
        assert len(samples) == 2
        for sample in samples:
            check_ids(sample.token_ids)
            assert len(sample.logprobs) == len(sample.token_ids)
            assert np.isfinite(sample.logprobs).all()
            assert sample.finish_reason in ("stop", "length")
            spans = sample.weight_versions
            must(spans and all(start < end for _, start, end in spans), spans)

    def check_reply(found: chat_endpoint.Reply) -> None:
        is_text(found.text)
        assert found.finish_reason in ("stop", "length")
        assert type(found.num_tokens) is int
        assert type(found.num_prompt_tokens) is int

    def by_server(data: bytes) -> np.ndarray:
        with _answering({"/v1/models": json.dumps(models).encode(), "/v1/completions": data}):
            return logprobs._by_server(server, text)

    def introduce(data: bytes) -> Server:
        about: dict[str, bytes] = {
            "/resume": b"",
            "/is_paused": b'{"is_paused": false}',
            "/weight_info": b'{"weight_version": "3"}',
        }
        about["/v1/models"] = json.dumps(models).encode()
        path, _, body = data.partition(b" ")
        with _answering({**about, path.decode(): body}):
            fresh = Server(url="http://host:1", key="k")
            fresh.introduce()
            return fresh

    def introduced(rng: random.Random) -> tuple[bytes, str]:
        path, value = rng.choice([
            ("/is_paused", {"is_paused": False}), ("/weight_info", {"weight_version": "3"}), ("/v1/models", models),
        ])  # fmt: skip
        body, what = json_damage(value)(rng)
        return path.encode() + b" " + body, what

    def check_server(found: Server) -> None:
        assert type(found.max_model_len) is int
        assert found.max_model_len > 0
        assert type(found.version) is int
        assert found.version >= 0

    def check_logprobs(found: np.ndarray) -> None:
        assert found.dtype == np.float32
        assert found.shape == (2,)

    return [
        Reader(
            name="reply",
            damaged=json_damage(generated),
            read=lambda data: reply.samples_of(data, server, request, UNPUSHED, Words(), 320),
            check=check_samples,
            errors=(ServerError, reply.AbortedError, reply.RestartedError),
            says=r"server host:1|^$|lost version",
            seeds=[json.dumps(generated).encode()],
        ),
        Reader(
            name="endpoint",
            damaged=json_damage(chat, parts),
            read=lambda data: asyncio.run(_asked(data)),
            check=check_reply,
            errors=(chat_endpoint.RefusedError, chat_endpoint.NoAnswerError),
            says=r"finish_reason|m at http://host:1",
            seeds=[json.dumps(chat).encode(), json.dumps(parts).encode()],
        ),
        Reader(
            name="server_logprobs",
            damaged=json_damage(scored),
            read=by_server,
            check=check_logprobs,
            errors=(ServerError,),
            says=r"server host:1",
            seeds=[json.dumps(scored).encode()],
        ),
        Reader(
            name="introduce",
            damaged=introduced,
            read=introduce,
            check=check_server,
            errors=(ServerError,),
            says=r"server host:1",
            seeds=[b"/v1/models " + json.dumps(models).encode()],
        ),
    ]


def _answering(answers: dict[str, bytes]) -> Any:
    """Servers' HTTP connections end here."""

    class Answer(io.BytesIO):
        version = 10  # which needs no headers to be whole

    class Opener:
        def open(self, request: Any, timeout: float) -> Any:
            return Answer(answers[request.selector])

    patched = pytest.MonkeyPatch()
    patched.setattr(servers, "_OPENER", Opener())

    class Undone:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            patched.undo()

    return Undone()


async def _asked(data: bytes) -> chat_endpoint.Reply:
    """What `ask` makes of a reply with status 200."""

    class Content:
        async def iter_any(self) -> Any:
            yield data

    class Response:
        status = 200
        content = Content()

        async def __aenter__(self) -> Response:
            return self

        async def __aexit__(self, *_: object) -> None: ...

    class Session:
        def post(self, *_: object, **__: object) -> Response:
            return Response()

    asked = chat_endpoint.ChatEndpoint(
        chat_endpoint.EndpointConfig(urls=("http://host:1",), model="m", max_retries=0), ""
    )
    asked._session = Session()  # type: ignore[assignment]
    asked._count = lambda *_: None  # type: ignore[method-assign]
    return await asked.ask([{"role": "user", "content": "?"}], max_new_tokens=4)
