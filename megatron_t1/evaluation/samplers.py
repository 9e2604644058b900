"""Where the responses of an evaluation come from: servers of ours, any OpenAI-compatible endpoint, or a file.

A sampler is asked for samples by question and number and hands each over, graded, as it comes. Sample j of a question
is drawn with a seed that depends on the run's seed, the question's id and j alone, so a resumed evaluation gets what
the uninterrupted one would have got.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

from megatron_t1.data.prompts import Question, id_of, is_missing, parse_rows
from megatron_t1.data.template import Template
from megatron_t1.evaluation.resume import prompts_identity
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.chat_endpoint import ChatEndpoint, RefusedError, run_workers
from megatron_t1.rollout.config import EndpointConfig, SamplingConfig
from megatron_t1.types import FinishReason, Reward, Sample, text_sample


@dataclass(frozen=True)
class Ask:
    """Samples `first` to `first` + `count` - 1 of a question."""

    question: Question
    first: int
    count: int


class Response(NamedTuple):
    text: str
    num_tokens: int
    """Generated tokens; 0 when an endpoint or a file does not say."""
    finish_reason: FinishReason
    reward: Reward


OnDone = Callable[[Question, int, list[Response]], None]
"""Gets the samples of a question from a number on; called from one thread."""


class Sampler(Protocol):
    def identity(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What decides the responses and `evaluate` is not told: JSON values by name."""

    def sample(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int, on_done: OnDone) -> None: ...


def sample_seed(seed: int, question_id: str) -> int:
    """Seed of a question's sample 0; 46 bits, so that its samples' seeds stay apart from other questions'."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{question_id}".encode(), digest_size=6).digest()) >> 2


def graded(sample: Sample) -> Response:
    assert sample.reward is not None
    return Response(sample.text, len(sample.token_ids), sample.finish_reason, sample.reward)


class ServerSampler:
    """vLLM servers of ours: token ids go in, so the chat template is the trainer's."""

    def __init__(self, rank0: Rank0, template: Template) -> None:
        self._rank0, self._template = rank0, template

    def identity(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {"prompts": prompts_identity(question.prompt(self._template) for question in questions)}

    def sample(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int, on_done: OnDone) -> None:
        self._rank0.client.generate_each(
            [ask.question.prompt(self._template) for ask in asks],
            [ask.count for ask in asks],
            [sample_seed(seed, ask.question.id) + ask.first for ask in asks],
            sampling,
            self._rank0.scorer.score,
            lambda i, j, samples: on_done(asks[i].question, asks[i].first + j, [graded(s) for s in samples]),
        )


class EndpointSampler:
    """An OpenAI-compatible endpoint, one request a sample. What it refuses is kept as an empty, wrong response."""

    def __init__(self, cfg: EndpointConfig, scorer: Scorer) -> None:
        self._cfg, self._scorer = cfg, scorer

    def identity(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {}  # the chat template is the endpoint's

    def sample(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int, on_done: OnDone) -> None:
        asyncio.run(self._sample(((ask, j) for ask in asks for j in range(ask.count)), sampling, seed, on_done))

    async def _sample(
        self, wanted: Iterator[tuple[Ask, int]], sampling: SamplingConfig, seed: int, on_done: OnDone
    ) -> None:
        async with ChatEndpoint(self._cfg) as endpoint:

            async def work() -> None:
                for ask, j in wanted:  # the workers share one iterator: memory does not grow with the number of asks
                    number = ask.first + j
                    response = await self._one(endpoint, ask.question, sampling, seed, number)
                    on_done(ask.question, number, [response])

            await run_workers(self._cfg.max_in_flight, work)

    async def _one(
        self, endpoint: ChatEndpoint, question: Question, sampling: SamplingConfig, seed: int, number: int
    ) -> Response:
        try:
            reply = await endpoint.ask(
                question.messages,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=(sample_seed(seed, question.id) + number) % 2**31,  # what hosted endpoints take
                stop=sampling.stop,
            )
        except RefusedError as refused:
            reward = Reward(value=0.0, correct=False, outcome="refused", extracted=None, reason=f"refused: {refused}")
            return Response("", 0, "stop", reward)
        prompt = question.prompt(None)
        sample = text_sample(reply.text, reply.finish_reason)
        return Response(reply.text, reply.num_tokens, reply.finish_reason, await self._scorer.score(prompt, sample))


class StoredSampler:
    """Responses from a JSON lines file: {"id", "response"}, optionally "num_tokens" and "finish_reason".

    Lines of one id are its samples, in their order.
    """

    def __init__(self, path: Path, scorer: Scorer) -> None:
        self.path, self._scorer = path, scorer
        self._stored: dict[str, list[dict[str, Any]]] = defaultdict(list)

        def parse(row: dict[str, Any], number: int) -> None:
            identity = id_of(row)
            if not isinstance(row.get("response"), str):
                raise ValueError('"response" is needed, a text')
            finish = row.get("finish_reason")
            count: Any = 0 if is_missing(row.get("num_tokens")) else row["num_tokens"]
            whole = type(count) is int or (isinstance(count, float) and count.is_integer())
            if not whole or count < 0:
                raise ValueError(f'"num_tokens" is {count!r}; it must be a number of tokens, or null')
            if finish not in (None, *get_args(FinishReason)):
                raise ValueError(f'"finish_reason" is {finish!r}; it must be stop, length or repetition, or null')
            row = {**row, "num_tokens": int(count), "finish_reason": finish or "stop"}
            self._stored[identity].append(row)

        parse_rows(path, parse)

    def identity(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {}  # nobody is asked

    def num_samples(self, questions: Sequence[Question]) -> int:
        """Samples a question; raises ValueError when some have none or not as many as the others."""
        counts = {question.id: len(self._stored.get(question.id, ())) for question in questions}
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[least] == 0 or counts[least] != counts[most]:
            raise ValueError(
                f"{self.path}: {counts[least]} responses to question {least!r} and {counts[most]} to {most!r}; every "
                "question needs the same number, and at least one"
            )
        return counts[least]

    def sample(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int, on_done: OnDone) -> None:
        wanted = [(ask.question, ask.first + j) for ask in asks for j in range(ask.count)]
        rows = [self._stored[question.id][number] for question, number in wanted]
        pairs = (
            (question.prompt(None), text_sample(row["response"], row["finish_reason"]))
            for (question, _), row in zip(wanted, rows, strict=True)
        )
        for (question, number), row, reward in zip(wanted, rows, self._scorer.score_iter(pairs), strict=True):
            response = Response(row["response"], row["num_tokens"], row["finish_reason"], reward)
            on_done(question, number, [response])
