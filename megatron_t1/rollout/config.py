"""What a user says about asking: how responses are drawn, and which chat endpoints there are."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_t1.fields import FieldError, above, at_least, http_only
from megatron_t1.servers.keys import read_key


@dataclass(kw_only=True, frozen=True)
class SamplingConfig:
    """How responses are drawn. T1: K = 64 at temperature 1.2; 0.9-1.0 collapses, above 1.2 degrades."""

    temperature: float = 1.2
    """The trainer computes its logprobs at this temperature too. 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Below 1 the sampled distribution is not the one the trainer differentiates: a bias, for evaluation only."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all. It biases the ratio as top_p does."""
    min_p: float = 0.0
    """Cuts tokens below min_p x the most likely one's probability; biases the ratio as top_p does (T1 ablates it)."""
    num_samples: int = 64
    """K: samples a prompt."""
    max_new_tokens: int = 4096
    """Longest response, tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (besides the model's end token)."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response (besides the model's end token)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise FieldError("temperature", self.temperature, "must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", self.top_p, "must lie in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise FieldError("min_p", self.min_p, "must lie in [0, 1)")
        at_least(self, 0, "top_k")
        if any(number < 0 for number in self.stop_token_ids):
            raise FieldError("stop_token_ids", self.stop_token_ids, "must be token ids, from 0 on")
        at_least(self, 1, "num_samples", "max_new_tokens")
        if self.temperature == 0 and self.num_samples > 1:
            raise FieldError("num_samples", self.num_samples, "must be 1 at temperature 0: greedy samples are the same")

    def identity(self) -> dict[str, Any]:
        """Of samples that are drawn so. Without top_k where it is off: what a release that lacked it stored is found
        again."""
        return {name: value for name, value in asdict(self).items() if name != "top_k" or value}

    def cuts(self) -> dict[str, float]:
        """The fields that keep tokens from being sampled which the policy may choose, with their values."""
        given = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k, 0), "min_p": (self.min_p, 0.0)}
        return {name: value for name, (value, off) in given.items() if value != off}


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible chat endpoint and how hard it may be asked."""

    urls: tuple[str, ...] = ()
    """Base URLs ("https://host/v1"), all of one model; requests go to the least busy one. `t1 serve` prints its own."""
    model: str = "policy"
    """Name of the model at the endpoint; servers of `t1 serve` call theirs `policy`."""
    key_env: str = ""
    """Environment variable that holds the API key."""
    key_file: str | None = None
    """File that holds the API key, readable by its owner alone."""
    max_in_flight: int = 1024
    """Requests at the endpoint at the same time."""
    timeout_s: float = 1800.0
    """Deadline for one request; a stalled one is asked again."""
    max_retries: int = 8
    """Times one request is asked again after failures other than a rate limit."""
    max_rate_limited_s: float = 7200.0
    """How long one request may be kept waiting by rate limits alone."""
    price_in: float = 0.0
    """Price of a million prompt tokens, in any currency."""
    price_out: float = 0.0
    """Price of a million generated tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """More fields of every request: {"reasoning_effort": "high"}; null leaves one out: {"temperature": null}."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens", ""] = "max_tokens"
    """Field that limits the generated tokens; newer models take `max_completion_tokens` alone. Empty: none is sent."""

    def __post_init__(self) -> None:
        http_only(self, "urls")
        at_least(self, 1, "max_in_flight")
        at_least(self, 0, "max_retries")
        above(self, 0, "timeout_s", "max_rate_limited_s")

    def key(self) -> str:
        """The API key; empty when neither variable nor file is named.

        Raises:
            ValueError: a variable that is not set, a file that is missing or that others may read.
        """
        if self.key_file:
            return read_key(Path(self.key_file))
        if self.key_env and not os.environ.get(self.key_env):
            raise ValueError(f"endpoint.key_env = {self.key_env} must be set: the environment has no such variable")
        return os.environ.get(self.key_env, "") if self.key_env else ""
