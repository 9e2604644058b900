"""What a server is asked, and its answer as samples. Replies are other people's data: every type, length and range is
checked.

msgspec reads them: what a sample needs and nothing else, with its types, in a tenth of the time of the json module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from megatron_t1.data.template import opened_thinking
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.server import NO_LOGPROB, Server, ServerError, parse_version, weights_in_words
from megatron_t1.types import FinishReason, Sample


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
    cache_salt: str | None = None
    """Prompts of one salt share the server's prefix cache with each other and with nobody else."""

    def body(self) -> dict[str, Any]:
        """As `/inference/v1/generate` takes it."""
        sampling = self.sampling
        salt = {} if self.cache_salt is None else {"cache_salt": self.cache_salt}
        return {
            **salt,
            "token_ids": self.token_ids,
            "sampling_params": {
                "n": self.count,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": self.seed,
                "stop": list(sampling.stop),
                "stop_token_ids": list(sampling.stop_token_ids),
                "detokenize": bool(sampling.stop),  # the server needs text only to find stop strings
                "logprobs": 0,
            },
        }


class AbortedError(Exception):
    """The server cut the request short to take new weights."""


class RestartedError(Exception):
    """The server answered with older weights than it held when it was asked."""


class _TokenLogprob(msgspec.Struct):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    finish_reason: FinishReason | Literal["abort"]
    token_ids: list[int]
    logprobs: _Logprobs
    weight_versions: list[_Span]


class _Reply(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Reply)


def samples_of(
    raw: bytes, server: Server, request: Request, held: int, tokenizer: Tokenizer, vocab_size: int
) -> list[Sample]:
    """The samples in the JSON reply of a server that held version `held` when it was asked.

    Raises:
        ServerError: a reply that is not what was asked for; it names the server.
        AbortedError: a push cut the request short.
        RestartedError: the server lost its weights meanwhile.
    """
    try:
        choices = sorted(_DECODER.decode(raw).choices, key=lambda choice: choice.index)
        if len(choices) != request.count:
            raise ValueError(f"{len(choices)} samples, not {request.count}")
        if [choice.index for choice in choices] != list(range(request.count)):
            raise ValueError(f"samples of the indices {[choice.index for choice in choices]}")
        return [_sample(choice, server, request, held, tokenizer, vocab_size) for choice in choices]
    except (ValueError, OverflowError, RecursionError) as error:  # msgspec's are ValueErrors, and name the field
        raise ServerError(
            f"server {server.name}: unreadable reply for {request.label}: {error!s:.500}; it begins {raw[:100]!r}"
        ) from None


def _sample(
    choice: _Choice, server: Server, request: Request, held: int, tokenizer: Tokenizer, vocab_size: int
) -> Sample:
    if choice.finish_reason == "abort":
        raise AbortedError
    content = choice.logprobs.content
    token_ids = np.array(choice.token_ids, dtype=np.int64)
    with np.errstate(over="ignore"):  # an infinite one is refused below
        logprobs = np.array([entry.logprob for entry in content], dtype=np.float32)
    count = len(token_ids)
    if not 0 < count <= request.sampling.max_new_tokens:
        raise ValueError(f"{count} tokens, not 1 to {request.sampling.max_new_tokens}")
    if choice.finish_reason == "length" and count < request.sampling.max_new_tokens:
        raise ValueError(f"cut after {count} of {request.sampling.max_new_tokens} tokens, by a shorter max_model_len")
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size}")
    if [entry.token_id for entry in content] != choice.token_ids:
        raise ValueError(f"{len(content)} logprobs for {count} tokens, or of other tokens")
    if not np.isfinite(logprobs).all() or logprobs.min() <= NO_LOGPROB or logprobs.max() > 1e-4:
        raise ValueError("a logprob is not a finite number at or below 0")
    return Sample(
        token_ids=token_ids,
        logprobs=logprobs,
        text=opened_thinking(tokenizer, request.token_ids)
        + tokenizer.decode(choice.token_ids, skip_special_tokens=True),
        finish_reason=choice.finish_reason,
        weight_versions=_versions(server, choice.weight_versions, count, held),
        server=server.url,
    )


def _versions(server: Server, spans: list[_Span], count: int, held: int) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) spans, which must cover all tokens.

    The last token must come from the weights that the server held when it was asked, or from a push since.
    """
    result = tuple((parse_version(span.version), span.start, span.end) for span in spans)
    bounds = [0, *(end for _, _, end in result)]
    follow = all(start == before < end for before, (_, start, end) in zip(bounds, result, strict=False))
    if not follow or bounds[-1] != count:
        raise ValueError(f"weight_versions {result} do not cover {count} tokens")
    newest = result[-1][0]
    if newest < held:
        lost, holds = weights_in_words(held), weights_in_words(newest)
        raise RestartedError(f"it lost {lost} and holds {holds}: it was started again meanwhile")
    if newest > server.version:
        raise ServerError(
            f"server {server.name} generated with weights of version {newest}, it should hold "
            f"{weights_in_words(server.version)}: somebody else pushed into it"
        )
    return result
