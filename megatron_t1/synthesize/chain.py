"""One question's way to an SFT chain, on one screen:

    attempts  -> graded against the gold answer; questions that are too easy, too hard or noisy are left out
    critiques -> of some wrong attempts and a right one; one that judges against the grader is thrown away
    integrate -> one chain that tries, notices, corrects and verifies
    rewrite   -> in one voice
    response  -> graded again, searched for what gives the answer away, for bad patterns and for length

Every request goes through the store, so a question that was interrupted takes its finished stages from there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from megatron_t1.data.prompts import Question
from megatron_t1.reward.answers import extract
from megatron_t1.reward.answers.numbers import answer_key
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.chat_endpoint import ChatEndpoint, RefusedError, Reply
from megatron_t1.synthesize.config import SynthesizeConfig
from megatron_t1.synthesize.filters import NO_CORRECTION, chain_is_unfit, corrects, question_is_unfit
from megatron_t1.synthesize.prompts import Prompts, Stage
from megatron_t1.synthesize.store import Store
from megatron_t1.types import Message, Reward, text_sample

T = TypeVar("T")


class Dropped(Exception):  # noqa: N818
    """The question ends here; the message is the reason, which is counted."""


@dataclass(kw_only=True)
class Attempt:
    """What the templates see of an attempt."""

    text: str
    answer: str | None
    correct: bool
    model: str
    outcome: str
    critique: str | None = None

    @property
    def thinking(self) -> str:
        """The text between the think tags; all of it without tags."""
        return self.text.rpartition("</think>")[0].partition("<think>")[2] or self.text


@dataclass(kw_only=True)
class Outcome:
    """A question at its end; what the files say of it."""

    question: Question
    attempts: list[Attempt] = field(default_factory=list)
    used: list[Attempt] = field(default_factory=list)
    """Those in the chain, the wrong ones first."""
    integrated: str | None = None
    rewritten: str | None = None
    response: str | None = None
    corrects: bool = False
    """Whether the response holds a failure and its correction."""
    reached: str = "attempt"
    """The last stage that was begun."""
    dropped: str | None = None
    """Why there is no chain; None: it is kept."""
    costs: Counter[str] = field(default_factory=Counter)
    """stage/requests, stage/prompt_tokens, stage/tokens, stage/price"""

    def row(self) -> dict[str, Any]:
        return {
            "id": self.question.id,
            "messages": self.question.messages,
            "gold": self.question.gold,
            "num_attempts": len(self.attempts),
            "num_right": sum(attempt.correct for attempt in self.attempts),
            "attempts": [asdict(attempt) for attempt in self.used],
            "integrated": self.integrated,
            "rewritten": self.rewritten,
            "response": self.response,
            "corrects": self.corrects,
            "reached": self.reached,
            "dropped": self.dropped,
            "costs": {name: round(count, 9) for name, count in sorted(self.costs.items())},
        }


@dataclass(frozen=True)
class Workshop:
    """What all questions share."""

    cfg: SynthesizeConfig
    prompts: Prompts
    endpoints: dict[str, ChatEndpoint]
    identities: dict[str, Any]
    """Endpoint -> what tells its model from others in the store's keys."""
    scorer: Scorer
    store: Store
    opened: dict[str, str] = field(default_factory=dict)
    """Endpoint -> the `<think>` that its chat template opens, where its replies lack it."""

    async def make(self, question: Question) -> Outcome:
        """One question through all stages.

        Raises:
            EndpointError: an endpoint gives no answer.
        """
        outcome = Outcome(question=question)
        try:
            await self._attempt(outcome)
            await self._critique(outcome)
            attempts = list(outcome.used)
            chain = await self._draft(outcome, "integrate", self.cfg.integrate_with, attempts=attempts)
            outcome.integrated = chain
            if self.cfg.rewrite:
                chain = await self._draft(outcome, "rewrite", self.cfg.rewrite_with, chain=chain)
                outcome.rewritten = chain
            await self._respond(outcome, chain)
        except Dropped as reason:
            outcome.dropped = str(reason)
        return outcome

    async def _attempt(self, outcome: Outcome) -> None:
        names = self.cfg.attempt_with or tuple(self.endpoints)

        async def one(number: int) -> tuple[Attempt, Reward]:
            name = names[number % len(names)]
            reply = await self._ask(outcome, "attempt", name, number, question=outcome.question.text)
            reward = await self._grade(outcome.question, reply)
            attempt = Attempt(
                text=reply.text, answer=reward.extracted, correct=reward.correct, model=name, outcome=reward.outcome
            )
            return attempt, reward

        made = await _all(one(number) for number in range(self.cfg.num_attempts))
        outcome.attempts = [attempt for attempt, _ in made]
        if reason := question_is_unfit(self.cfg.filter, [reward for _, reward in made], self.cfg.require_wrong):
            raise Dropped(reason)
        # Short and well-formed first; wrong ones with different answers, so that the chain tries different ways.
        order = sorted(made, key=lambda pair: (bool(pair[1].penalties), len(pair[0].text), pair[0].text))
        failed = [attempt for attempt, _ in reversed(order) if attempt.outcome == "wrong"]
        wrong = {answer_key(attempt.answer or ""): attempt for attempt in failed}
        chosen = sorted(wrong.values(), key=lambda attempt: (len(attempt.text), attempt.text))[: self.cfg.max_wrong]
        outcome.used = [*chosen, next(attempt for attempt, _ in order if attempt.correct)]

    async def _critique(self, outcome: Outcome) -> None:
        outcome.reached = "critique"
        name = self.cfg.critique_with or next(iter(self.endpoints))
        stage = self.prompts["critique"]

        async def one(number: int, attempt: Attempt) -> None:
            question = outcome.question
            reply = await self._ask(
                outcome, "critique", name, number, question=question.text, gold=question.gold, attempt=attempt
            )
            text = _kept(stage, reply)
            pattern = stage.expect.get("right" if attempt.correct else "wrong")
            if text and reply.finish_reason == "stop" and (pattern is None or pattern.search(text)):
                attempt.critique = text

        await _all(one(number, attempt) for number, attempt in enumerate(outcome.used))
        outcome.used = [attempt for attempt in outcome.used if attempt.critique is not None]
        if not any(attempt.correct for attempt in outcome.used):
            raise Dropped("the critic does not find the right attempt right")
        if self.cfg.require_wrong and all(attempt.correct for attempt in outcome.used):
            raise Dropped("the critic finds no fault with the wrong attempts")

    async def _draft(self, outcome: Outcome, name: str, endpoint: str, **values: Any) -> str:
        """The chain that a stage makes of the one before."""
        outcome.reached = name
        endpoint = endpoint or next(iter(self.endpoints))
        reply = await self._ask(outcome, name, endpoint, 0, question=outcome.question.text, **values)
        if reply.finish_reason != "stop":
            raise Dropped(f"{name}: cut at max_tokens or in a loop")
        if not (text := _kept(self.prompts[name], reply)):
            raise Dropped(f"{name}: empty or never closed its thinking")
        return text

    async def _respond(self, outcome: Outcome, chain: str) -> None:
        outcome.reached = "filter"
        tail = extract.after_thinking(chain)
        answer = extract.last_box(tail) if tail else None
        if answer is None:
            raise Dropped("the chain has no boxed answer")
        response = self.prompts.response.render(chain=chain, answer=answer)
        outcome.response = response
        reward = await self.scorer.score(outcome.question.prompt(None), text_sample(response, "stop"))
        if reason := chain_is_unfit(self.cfg.filter, response, reward, outcome.question.text):
            raise Dropped(reason)
        outcome.corrects = corrects(response, [attempt.answer for attempt in outcome.used if not attempt.correct])
        if self.cfg.require_wrong and not outcome.corrects:
            raise Dropped(NO_CORRECTION)

    async def _grade(self, question: Question, reply: Reply) -> Reward:
        return await self.scorer.score(question.prompt(None), text_sample(reply.text, reply.finish_reason))

    async def _ask(self, outcome: Outcome, name: str, endpoint: str, number: int, **values: Any) -> Reply:
        """A reply from the store, or else from the endpoint; both cost what the endpoint said."""
        stage = self.prompts[name]
        messages = self._messages(stage, outcome.question, values)
        sampling: dict[str, Any] = {
            "max_new_tokens": stage.max_tokens,
            "temperature": stage.temperature,
            "top_p": stage.top_p,
            "stop": list(stage.stop),
            "seed": _seed(self.cfg.seed, outcome.question.id, name, number),
        }
        key = self.store.key([self.identities[endpoint], messages, sampling])
        stored = self.store.get(key)
        if stored is None:
            try:
                stored = asdict(await self.endpoints[endpoint].ask(messages, **sampling))
            except RefusedError as refused:
                stored = {"refused": str(refused)}
            self.store.put(key, stored)
        cfg = self.endpoints[endpoint].cfg
        outcome.costs[f"{name}/requests"] += 1
        if "refused" in stored:
            raise Dropped(f"{name}: refused by {endpoint}")
        reply = Reply(**stored)
        opened = self.opened.get(endpoint, "")
        if messages[-1]["role"] == "user" and not reply.text.lstrip().startswith(opened.strip()):
            reply = replace(reply, text=opened + reply.text)
        price = (reply.num_prompt_tokens * cfg.price_in + reply.num_tokens * cfg.price_out) / 1e6
        outcome.costs.update({f"{name}/prompt_tokens": reply.num_prompt_tokens, f"{name}/tokens": reply.num_tokens})
        outcome.costs[f"{name}/price"] += price  # type: ignore[assignment]
        return reply

    @staticmethod
    def _messages(stage: Stage, question: Question, values: dict[str, Any]) -> list[Message]:
        """The stage's messages; an attempt is made in the question's own conversation, system message included."""
        messages = stage.render(**values)
        return [*question.messages[:-1], *messages] if stage.name == "attempt" else messages


async def _all(tasks: Iterable[Awaitable[T]]) -> list[T]:
    """Their results; the first error in their order, once all have ended: what a question costs is then no accident."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def _kept(stage: Stage, reply: Reply) -> str | None:
    """The reply without its author's own thinking; None when that never closed."""
    text = reply.text if stage.keep_thinking else extract.after_thinking(reply.text)
    return text.strip() if text else None


def _seed(seed: int, question: str, stage: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{question}/{stage}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
