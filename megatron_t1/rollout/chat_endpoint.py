"""Asks OpenAI-compatible chat endpoints (vLLM's own, or anybody's): messages in, text and token counts out.

Concurrency, as a contract: any number of `ask` may be awaited on one event loop. At most `max_in_flight` of them are at
the endpoint; a rate limit (429, 503) halves that number, stops new requests until its Retry-After has passed, and
answers raise it again one by one. Whatever else may pass by itself (connection errors, timeouts, 5xx, replies that are
no answer) is asked again with doubling, jittered pauses. The first failure of each kind is said on stderr.

aiohttp instead of the openai package: that takes more than ten times the CPU a request (benchmarks/client.md), and its
retries know nothing of the other requests. Left out: streaming.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from megatron_t1.files import raise_open_files_limit, storable
from megatron_t1.rollout.config import EndpointConfig
from megatron_t1.rollout.frozen_heap import frozen_heap
from megatron_t1.types import FinishReason, Message
from megatron_t1.warn import warn

_MAX_REPLY_BYTES = 64 << 20
_MAX_PAUSE_S = 60.0
_MAX_RETRY_AFTER_S = 900.0


_FINISH_REASONS: dict[Any, FinishReason] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", None), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    "repetition": "repetition",
}
"""Spellings of an ending by itself, at the limit, in a loop. Any other (content_filter) would come again."""


class EndpointError(RuntimeError):
    """The endpoint can't be used: wrong URL, model or key. The message says what to do."""


class NoAnswerError(EndpointError):
    """One request got no answer after all retries; others may."""


class RefusedError(ValueError):
    """The endpoint refuses this one request (too long, not allowed); others may be fine."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer."""

    text: str
    """With the thinking in <think> tags when the endpoint returned it apart."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    """As the endpoint counts; 0 when it does not say."""
    num_tokens: int
    """Generated tokens, as the endpoint counts; 0 when it does not say."""


class ChatEndpoint:
    """A client of one endpoint. Use as an async context manager, on one event loop."""

    def __init__(self, cfg: EndpointConfig, key: str | None = None, *, direct: bool = False) -> None:
        """
        Args:
            key: in place of the one that the config names.
            direct: pass by the environment's proxies: the endpoint is a server of ours.
        """
        if not cfg.urls:
            raise ValueError("endpoint.urls is empty: give the base URL of the endpoint")
        self.cfg = cfg
        self.events: Counter[str] = Counter()
        """Requests, rate limits and failures by kind."""
        self._urls = [_chat_url(url) for url in cfg.urls]
        self._proxies = {url: None if direct else _proxy_of(url) for url in self._urls}
        self._busy = Counter(dict.fromkeys(self._urls, 0))
        self._key = cfg.key() if key is None else key
        self._gate = _Gate(cfg.max_in_flight)
        self._hold_until = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ChatEndpoint:
        raise_open_files_limit()
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.cfg.timeout_s, sock_connect=30),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """One answer. A last message of the assistant is continued, and is part of the reply's text.

        Raises:
            RefusedError: this request is refused.
            NoAnswerError: no answer after all retries.
            EndpointError: the endpoint can't be used.
        """
        body: dict[str, Any] = {
            "model": self.cfg.model,
            "messages": list(messages),
            self.cfg.max_tokens_field: max_new_tokens,
            "temperature": temperature,
        }
        optional: dict[str, Any] = {
            "top_p": (top_p, 1.0),
            "top_k": (top_k, 0),
            "min_p": (min_p, 0.0),
            "seed": (seed, None),
            "stop": (list(stop), []),
        }
        body |= {name: value for name, (value, default) in optional.items() if value != default}
        prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        if prefill:
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        body |= self.cfg.extra_body
        data = json.dumps({name: value for name, value in body.items() if name and value is not None}).encode()
        failures, limited_since = 0, None
        while True:
            await self._gate.enter()
            asked_at = time.monotonic()
            pause_s = 0.0
            try:
                await self._wait_for_hold()
                self.events["requests"] += 1
                url = min(self._urls, key=self._busy.__getitem__)
                reply = await self._post(url, data)
                self._gate.answered()
                return _parse(reply, prefill)
            except RefusedError as refused:
                self._count("refused", f"{url}: a request was refused with {refused}")
                raise
            except _RateLimitedError as limit:
                self._count("rate limited", f"{url}: {limit}; waiting, then with fewer requests at a time")
                self._gate.limited(asked_at)
                pause_s = limit.retry_after_s
                self._hold_until = max(self._hold_until, time.monotonic() + pause_s)
                limited_since = limited_since or asked_at
                if time.monotonic() + pause_s - limited_since > self.cfg.max_rate_limited_s:
                    raise NoAnswerError(
                        f"{self.cfg.model}: rate limited for longer than endpoint.max_rate_limited_s = "
                        f"{self.cfg.max_rate_limited_s:g} s"
                    ) from None
            except (aiohttp.ClientError, TimeoutError, OSError, _GarbageError) as error:
                kind = "timeout" if isinstance(error, TimeoutError) else type(error).__name__.strip("_")
                reason = str(error) or kind
                self._count(kind, f"{url}: {reason}; asking again, {self.cfg.max_retries} times a request at most")
                failures += 1
                if failures > self.cfg.max_retries:
                    raise NoAnswerError(
                        f"{self.cfg.model} at {url}: no answer after {failures} attempts, the last one: {reason}"
                    ) from None
                pause_s = min(_MAX_PAUSE_S, 0.5 * 2 ** min(10, failures))
            finally:
                self._gate.leave()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # those that failed together come back apart

    def _count(self, kind: str, told: str) -> None:
        self.events[kind] += 1
        if self.events[kind] == 1:
            warn(f"{self.cfg.model} at {told} (said once)")

    async def _wait_for_hold(self) -> None:
        while (left := self._hold_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _post(self, url: str, data: bytes) -> Any:
        assert self._session is not None
        self._busy[url] += 1
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(
                url, data=data, headers=headers, allow_redirects=False, proxy=self._proxies[url]
            ) as response:
                raw = await _bounded(response)
        finally:
            self._busy[url] -= 1
        status = response.status
        if status == 200:
            try:
                return json.loads(raw)
            except (ValueError, RecursionError):
                raise _GarbageError(f"a reply that is no JSON: {raw[:100]!r}") from None
        said = f"{status}: {raw[:500].decode(errors='replace')}"
        if status in (429, 503):
            raise _RateLimitedError(said, _retry_after_s(response.headers.get("Retry-After")))
        if status in (401, 402, 403, 404) or 300 <= status < 400:
            raise EndpointError(
                f"{self.cfg.model} at {url}: refused with {said}; mend the URL, the model's name or the key"
            )
        if status >= 500 or status in (408, 409, 425):
            raise aiohttp.ClientError(said)
        raise RefusedError(said)


async def run_workers(count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """`count` workers at the same time; the first error ends the others and is raised as it is."""
    try:
        with frozen_heap():
            async with asyncio.TaskGroup() as tasks:
                for _ in range(count):
                    tasks.create_task(work())
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


class _RateLimitedError(Exception):
    def __init__(self, said: str, retry_after_s: float) -> None:
        super().__init__(f"rate limited with {said}")
        self.retry_after_s = retry_after_s


class _GarbageError(Exception):
    """A reply with status 200 that holds no answer."""


class _Gate:
    """How many requests may be at the endpoint: halved by a rate limit, raised by one per round of answers."""

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        self._most, self._inside, self._halved_at = most, 0, 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if not self._waiting and self._inside < int(self.limit):
            self._inside += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came, and nobody takes it
                self.leave()
            raise

    def leave(self) -> None:
        self._inside -= 1
        while self._waiting and self._inside < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)

    def answered(self) -> None:
        self.limit = min(self._most, self.limit + 1 / self.limit)

    def limited(self, asked_at: float) -> None:
        """Once for all requests that were under way at the same time."""
        if asked_at >= self._halved_at:
            self.limit = max(1.0, self.limit / 2)
            self._halved_at = time.monotonic()


def _chat_url(base: str) -> str:
    base = base.rstrip("/")
    if base.count("/") == 2:  # nothing but a host
        base += "/v1"
    return base + "/chat/completions"


def _proxy_of(url: str) -> str | None:
    """What the environment says for it (HTTP_PROXY, HTTPS_PROXY, NO_PROXY); None for this machine itself."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1" or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > _MAX_REPLY_BYTES:
            raise _GarbageError(f"a reply of more than {_MAX_REPLY_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def _retry_after_s(header: str | None) -> float:
    """Seconds or an HTTP date; one second when absent or unreadable."""
    wait_s = 1.0
    if header:
        try:
            wait_s = float(header)
        except ValueError:
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                wait_s = parsedate_to_datetime(header).timestamp() - time.time()
    return min(_MAX_RETRY_AFTER_S, max(0.1, wait_s)) if wait_s == wait_s else 1.0


def _parse(reply: Any, prefill: str) -> Reply:
    """Replies are other people's data: everything is checked before use."""
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal = message.get("refusal")
        text = _text_of(message.get("content"))
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        usage = reply.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _GarbageError(f"a reply without an answer ({error!r}): {str(reply)[:100]}") from None
    if not isinstance(thinking, str):
        raise _GarbageError("a reply whose content is no text")
    if finish == "error":
        raise _GarbageError("finish_reason is 'error'")
    if finish is not None and not isinstance(finish, str):
        raise _GarbageError(f"a reply whose finish_reason is {finish!r:.100}")
    if refusal or finish not in _FINISH_REASONS:
        raise RefusedError(f"finish_reason {finish!r:.100}" + (f": {storable(str(refusal)[:200])}" if refusal else ""))
    num_prompt, num_generated = (count if type(count) is int and count >= 0 else 0 for count in counts)
    if not (text or thinking or num_generated):  # a model may end at once; then it has generated its end token
        raise _GarbageError("a reply without text")
    if thinking:
        text = f"<think>{thinking}</think>{text}"
    return Reply(
        text=storable(prefill + text),
        finish_reason=_FINISH_REASONS[finish],
        num_prompt_tokens=num_prompt,
        num_tokens=num_generated,
    )


def _text_of(content: Any) -> str:
    """A message's content; of one in parts, thinking comes in <think> tags.

    Raises:
        _GarbageError: it is neither text nor parts of text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise _GarbageError(f"a reply whose content is no text: {str(content)[:100]}")
    texts = []
    for part in content:
        if part.get("type") in ("thinking", "reasoning"):
            texts.append(f"<think>{_text_of(part.get(part['type'], part.get('text')))}</think>")
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise _GarbageError(f"a reply with a part that is no text: {str(part)[:100]}")
    return "".join(texts)
