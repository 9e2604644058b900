"""What a server answered, as samples. Replies are other people's data: every type, length and range is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.endpoint import Server, ServerError, parse_version
from megatron_t1.types import Sample


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str: ...


@dataclass(frozen=True)
class Request:
    """`count` samples that continue one token prefix; child j is drawn with seed `seed` + j."""

    label: str
    token_ids: list[int]
    count: int
    seed: int
    sampling: SamplingConfig


class AbortedError(Exception):
    """The server cut the request short to take new weights."""


class RestartedError(Exception):
    """The server answered with older weights than it held when it was asked."""


def samples_of(
    reply: dict[str, Any], server: Server, request: Request, held: int, tokenizer: Tokenizer, vocab_size: int
) -> list[Sample]:
    """The samples in the reply of a server that held version `held` when it was asked.

    Raises:
        ServerError: a reply that is not what was asked for; it names the server.
        AbortedError: a push cut the request short.
        RestartedError: the server lost its weights meanwhile.
    """
    choices = reply["choices"]
    if len(choices) != request.count:
        raise ServerError(f"server {server.name}: {len(choices)} samples for {request.label}, not {request.count}")
    try:
        choices = sorted(choices, key=lambda choice: choice["index"])
        return [_sample(choice, server, request, held, tokenizer, vocab_size) for choice in choices]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"server {server.name}: unreadable sample for {request.label}: {error!r}") from None


def _sample(
    choice: dict[str, Any], server: Server, request: Request, held: int, tokenizer: Tokenizer, vocab_size: int
) -> Sample:
    if choice["finish_reason"] == "abort":
        raise AbortedError
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason is {choice['finish_reason']!r}")
    content = choice["logprobs"]["content"]
    token_ids = np.array(choice["token_ids"], dtype=np.int64)
    logprobs = np.array([entry["logprob"] for entry in content], dtype=np.float32)
    scored_ids = [entry["token_id"] for entry in content]
    count = len(token_ids)
    if token_ids.ndim != 1 or not 0 < count <= request.sampling.max_new_tokens:
        raise ValueError(f"token_ids has shape {token_ids.shape}, limit {request.sampling.max_new_tokens}")
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size}")
    if scored_ids != choice["token_ids"]:
        raise ValueError(f"{len(content)} logprobs for {count} tokens, or of other tokens")
    if not np.isfinite(logprobs).all() or logprobs.max() > 1e-4:
        raise ValueError("a logprob is not a finite number at or below 0")
    return Sample(
        token_ids=token_ids,
        logprobs=logprobs,
        text=tokenizer.decode(token_ids.tolist(), skip_special_tokens=True),
        finish_reason=choice["finish_reason"],
        weight_versions=_versions(server, choice["weight_versions"], count, held),
        server=server.url,
    )


def _versions(server: Server, spans: list[dict[str, Any]], count: int, held: int) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) spans, which must cover all tokens.

    The last token must come from the weights that the server held when it was asked, or from a push since.
    """
    result = tuple((parse_version(span["version"]), int(span["start"]), int(span["end"])) for span in spans)
    bounds = [0, *(end for _, _, end in result)]
    if [start for _, start, _ in result] != bounds[:-1] or bounds[-1] != count:
        raise ValueError(f"weight_versions {result} do not cover {count} tokens")
    newest = result[-1][0]
    if newest < held:
        raise RestartedError(f"it lost version {held} and holds {newest}: it was started again meanwhile")
    if newest > server.version:
        raise ServerError(
            f"server {server.name} generated with weights of version {newest}, it should hold {server.version}: "
            "somebody else pushed into it"
        )
    return result
