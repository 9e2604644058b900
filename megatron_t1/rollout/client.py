"""Asks the least loaded of the vLLM servers for samples: token ids in; ids, processed logprobs, weight versions out.

Concurrency, as a contract: one background thread runs one event loop; a public call hands it a coroutine and blocks.
Every request waits for a server with room, is asked there, and is asked again elsewhere when that server fails; a
watcher ends the requests of a server that stopped answering. Samples are scored as they arrive while others generate.
Left out: streaming. A request carries `samples_per_request` samples, which measured best: per-sample requests cost the
server 2 ms each, one request per prompt waits for its slowest sample. aiohttp, because httpx took 20 times its CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import aiohttp
import msgspec
from tqdm import tqdm

from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import StepBank
from megatron_t1.rollout.reply import AbortedError, Request, RestartedError, Tokenizer, samples_of
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import NO_LOGPROB, Server, ServerError, watched_socket
from megatron_t1.servers.servers import Servers
from megatron_t1.trace import Trace
from megatron_t1.types import Group, Prompt, Reward, Sample

T = TypeVar("T")
Score = Callable[[Prompt, Sample], Awaitable[Reward]]

_WATCH_INTERVAL_S = 2.0
_CONNECT_TIMEOUT_S = 10.0
_MAX_PAUSE_S = 10.0
_REQUEST_TOKENS = 1 << 18
"""New tokens that one request may ask for, unless it is of one sample."""


class RolloutClient:
    """Samples from all usable servers of `servers`. Close it (or use `with`) to end its thread and connections."""

    def __init__(self, servers: Servers, tokenizer: Tokenizer, *, vocab_size: int, trace: Trace | None = None) -> None:
        """`vocab_size`: rows of the model's embedding; a reply with an id beyond it is refused."""
        self.servers = servers
        self._trace = trace or Trace()
        self.cfg = servers.cfg
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._load: dict[str, int] = {}  # samples in flight, by URL
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self._room = asyncio.Condition()
        self._calls: set[Future[Any]] = set()
        self._cancelled = False

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        score: Score | None = None,
        *,
        seed: int,
        bank: StepBank | None = None,
    ) -> list[Group]:
        """`sampling.num_samples` samples of every prompt, graded by `score` when given; order as asked.

        Requests whose samples are in `bank` are not asked again; those that finish are added to it.
        The same seed gives the same samples from the same weights on the same server setup, whatever the number of
        samples a request carries. Raises ServerError when no server is left, ValueError when a prompt does not fit.
        """
        requests = self._requests(_labelled(prompts), sampling, *counts_and_seeds(len(prompts), sampling, seed))
        samples = self._run(self._ask_all(requests, prompts, score, bank, show=True))
        return [Group(prompt=p, samples=s) for p, s in zip(prompts, samples, strict=True)]

    def complete_tokens(
        self,
        token_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        cache_salt: str | None = None,
    ) -> list[list[Sample]]:
        """`sampling.num_samples` continuations of every token prefix, as they are (no chat template).

        `cache_salt`: keeps the prefixes apart from all that the servers' prefix caches hold of other salts.
        """
        labelled = [(f"prefix {i}", [int(t) for t in ids]) for i, ids in enumerate(token_ids)]
        counts, seeds = counts_and_seeds(len(labelled), sampling, seed)
        requests = self._requests(labelled, sampling, counts, seeds, cache_salt)
        return self._run(self._ask_all(requests, None, None, None))

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        score: Score | None,
        on_done: Callable[[int, int, list[Sample]], None],
    ) -> None:
        """`counts[i]` samples of prompts[i], number j of them drawn with `seeds[i]` + j, handed over as they come.

        `on_done(i, j, samples)` gets the samples of prompts[i] from number j on, in the client's thread; nothing is
        kept here. Raises as `generate` does.
        """
        requests = self._requests(_labelled(prompts), sampling, counts, seeds)
        self._run(self._ask_all(requests, prompts, score, None, on_done))

    def check_room(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        """Raises ValueError when a server takes fewer tokens than one of the prompts with its response may have."""
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        self._requests(_labelled([longest]), sampling, [1], [0])

    def check_logprob_contract(self, token_ids: Sequence[int] = (0, 1, 2)) -> None:
        """Raises ServerError when a server returns logprobs from before the temperature.

        The difference of two tokens' logprobs is their logits' difference / temperature. Asked at 1 and at 2, processed
        differences halve; raw ones stay as they are. (Where both are 0 the two agree, and there is nothing to get
        wrong.)
        """
        self._run(self._check_contract([int(t) for t in token_ids]))

    def samples_in_flight(self) -> dict[str, int]:
        """By URL of the server that was asked for them."""
        return dict(self._load)

    def cancel(self) -> None:
        """Ends the calls that other threads wait in, and those to come: they raise CancelledError."""
        self._cancelled = True
        for call in list(self._calls):
            call.cancel()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        for session in list(self._sessions.values()):
            asyncio.run_coroutine_threadsafe(session.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._calls.add(future)
        if self._cancelled:
            future.cancel()
        try:
            return future.result()
        except BaseException as error:
            future.cancel()  # Ctrl-C ends the wait here, not the work there
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            self._calls.discard(future)

    def _requests(
        self,
        labelled: Sequence[tuple[str, list[int]]],
        sampling: SamplingConfig,
        counts: Sequence[int],
        seeds: Sequence[int],
        cache_salt: str | None = None,
    ) -> list[list[Request]]:
        usable = self.servers.usable()
        limit = min((server.max_model_len for server in usable), default=0)
        requests = []
        for (label, ids), count, seed in zip(labelled, counts, seeds, strict=True):
            if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise ValueError(f"{label}: token ids must be in [0, {self.vocab_size}) and not empty")
            if usable and len(ids) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"{label}: {len(ids)} prompt tokens + sampling.max_new_tokens = {sampling.max_new_tokens} "
                    f"exceed the servers' max_model_len = {limit}: raise rollout.max_model_len, lower max_new_tokens "
                    "or drop the prompt"
                )
            parts = parts_of(count, self.cfg, sampling)
            requests.append([Request(label, ids, part, seed + j, sampling, cache_salt) for j, part in parts])
        return requests

    async def _ask_all(
        self,
        requests: list[list[Request]],
        prompts: Sequence[Prompt] | None,
        score: Score | None,
        bank: StepBank | None,
        on_done: Callable[[int, int, list[Sample]], None] | None = None,
        show: bool = False,
    ) -> list[list[Sample]]:
        """`show`: a progress bar while it lasts, where a person looks on."""
        total = sum(request.count for group in requests for request in group)
        unanswered: list[NoServerLeftError] = []
        with tqdm(total=total, desc="generate", unit="sample", disable=None if show else True, leave=False) as bar:

            async def one(i: int, request: Request) -> list[Sample]:
                samples = bank.find(request.token_ids, request.seed, request.count) if bank else None
                if samples is not None:
                    bar.update(len(samples))
                    return samples
                try:
                    samples = await self._ask(request)
                except NoServerLeftError as error:
                    unanswered.append(error)  # the others may be in the grader still
                    return []
                if score is not None and prompts is not None:
                    with self._trace.busy("grading", "grade"):
                        rewards = await asyncio.gather(*(score(prompts[i], sample) for sample in samples))
                    for sample, reward in zip(samples, rewards, strict=True):
                        sample.reward = reward
                if bank is not None:
                    await asyncio.to_thread(bank.add, request.label, request.token_ids, request.seed, samples)
                bar.update(len(samples))
                if on_done is None:
                    return samples
                on_done(i, request.seed - requests[i][0].seed, samples)
                return []

            async with self._watched(), asyncio.TaskGroup() as tasks:
                running = [
                    [tasks.create_task(one(i, request)) for request in group] for i, group in enumerate(requests)
                ]
        if unanswered:
            raise unanswered[0]
        return [[sample for task in group for sample in task.result()] for group in running]

    async def _ask(self, request: Request) -> list[Sample]:
        def read(raw: bytes, server: Server, held: int) -> list[Sample]:
            return samples_of(raw, server, request, held, self.tokenizer, self.vocab_size)

        return await self._reply(request.body(), request.count, read)

    async def _reply(
        self,
        body: dict[str, Any],
        count: int,
        read: Callable[[bytes, Server, int], T],
        only: Server | None = None,
    ) -> T:
        """Asks (`only` this server) until one answered what `read` takes, given the version that it held when asked;
        a failing one is left out by and by, and none left is an error."""
        failures = Counter[str]()
        while True:
            server = await self._take(count, only)
            held = server.version
            try:
                with self._trace.busy(f"server {server.name}", "generate", count):
                    raw = await self._post(server, body)
                return read(raw, server, held)
            except AbortedError:
                continue  # a push made room for itself; the same seed is asked again
            except RestartedError as error:
                server.unusable = str(error)
                continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failures[server.url] += 1
                # aiohttp's own TimeoutErrors are connections that did not come about.
                if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                    server.unusable = f"no answer within rollout.request_timeout_s = {self.cfg.request_timeout_s:g} s"
                elif failures[server.url] >= self.cfg.connect_retries:
                    server.unusable = f"{failures[server.url]} connection errors, the last one: {error!r}"
            finally:
                await self._give_back(server, count)
            await asyncio.sleep(min(_MAX_PAUSE_S, 0.25 * 2 ** min(10, failures[server.url])))

    async def _take(self, count: int, only: Server | None) -> Server:
        """The least loaded usable server, once it has room: twice what it can run, so that it never runs dry."""
        while True:
            async with self._room:
                pushing = self.servers.pushing
                usable = [server for server in self.servers.usable() if only in (None, server)]
                if usable:
                    server = min(usable, key=lambda s: self._load.get(s.url, 0))
                    load = self._load.get(server.url, 0)
                    if load == 0 or load + count <= 2 * self.cfg.max_num_seqs:
                        self._load[server.url] = load + count
                        return server
                    await self._room.wait()
                    continue
            if not (pushing or self.servers.pushing):  # one may begin, or end, while it is asked who is usable
                raise NoServerLeftError(f"no server is left to generate:\n{self.servers.describe_failures()}")
            await asyncio.sleep(0.05)

    async def _give_back(self, server: Server, count: int) -> None:
        async with self._room:
            self._load[server.url] -= count
            if server in self.servers.usable():
                self._room.notify(count)  # not all: thousands may wait
            else:
                self._room.notify_all()

    async def _post(self, server: Server, body: dict[str, Any]) -> bytes:
        session = self._sessions.get(server.url)
        if session is None or session.closed:
            factory = partial(watched_socket, silence_s=self.cfg.health_timeout_s)
            session = self._sessions[server.url] = aiohttp.ClientSession(
                headers=server.headers,
                connector=aiohttp.TCPConnector(limit=0, socket_factory=factory),
                json_serialize_bytes=msgspec.json.encode,
                timeout=aiohttp.ClientTimeout(total=self.cfg.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            )
        async with session.post(server.url + "/inference/v1/generate", json=body) as response:
            raw, status = await response.read(), response.status
        if status >= 500:
            raise aiohttp.ClientError(f"{status}: {raw[:500].decode(errors='replace')}")
        if status != 200:
            raise ServerError(f"server {server.name} refused: {status}: {raw[:2000].decode(errors='replace')}")
        return raw

    async def _check_contract(self, token_ids: list[int]) -> None:
        bodies = []
        for temperature in (1.0, 2.0):
            sampling = SamplingConfig(temperature=temperature, num_samples=1, max_new_tokens=1)
            bodies.append(Request("contract", token_ids, 1, 0, sampling).body())
            bodies[-1]["sampling_params"]["logprobs"] = 10
        for server in self.servers.usable():
            try:
                async with self._watched():
                    logprobs = [await self._reply(body, 1, _top_logprobs, server) for body in bodies]
            except NoServerLeftError:
                if self.servers.usable():
                    continue
                raise
            common = sorted(logprobs[0].keys() & logprobs[1].keys(), key=logprobs[0].__getitem__)
            if len(common) < 2:
                raise ServerError(
                    f"server {server.name} returned no two tokens' finite logprobs at temperatures 1 and 2 alike"
                )
            at_1, at_2 = (values[common[-1]] - values[common[0]] for values in logprobs)
            if not math.isclose(at_1, 2 * at_2, rel_tol=1e-2, abs_tol=1e-3):
                raise ServerError(
                    f"server {server.name} returns logprobs that ignore the temperature (two tokens are {at_1:.4f} "
                    f"apart at temperature 1 and {at_2:.4f} at 2, not half of it): every policy ratio would be wrong. "
                    "Start it with --logprobs-mode processed_logprobs, as `t1 serve` does"
                )

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        """Ends the requests on a server that does not answer /health in time: they are then asked elsewhere."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            busy = [s for s in self.servers.usable() if self._load.get(s.url)]
            await asyncio.gather(*(self._check_health(server) for server in busy))

    async def _check_health(self, server: Server) -> None:
        deadline_s = self.cfg.health_timeout_s
        if await asyncio.to_thread(server.hangs, deadline_s):
            server.unusable = f"/health did not answer within rollout.health_timeout_s = {deadline_s:g} s"
            await self._sessions[server.url].close()


class NoServerLeftError(ServerError):
    """Every server was lost while samples were missing; the finished ones are in the bank."""


def _top_logprobs(raw: bytes, server: Server, _: int) -> dict[int, float]:
    """Of the first token, by token id."""
    try:
        top = msgspec.json.decode(raw)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logprobs = {int(entry["token_id"]): float(entry["logprob"]) for entry in top}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"server {server.name} returned no top logprobs: {error!r}") from None
    return {token: logprob for token, logprob in logprobs.items() if logprob > NO_LOGPROB}


def _labelled(prompts: Sequence[Prompt]) -> list[tuple[str, list[int]]]:
    return [(prompt.id, [int(t) for t in prompt.token_ids]) for prompt in prompts]


def parts_of(count: int, cfg: RolloutConfig, sampling: SamplingConfig) -> list[tuple[int, int]]:
    """(number of the first sample, samples) of each request for `count` samples of one prompt."""
    chunk = min(cfg.samples_per_request, cfg.max_num_seqs, max(1, _REQUEST_TOKENS // sampling.max_new_tokens))
    return [(j, min(chunk, count - j)) for j in range(0, count, chunk)]


def counts_and_seeds(number: int, sampling: SamplingConfig, seed: int) -> tuple[list[int], list[int]]:
    """For `number` prompts of one call: a 48-bit hash keeps calls apart, within one the seeds are consecutive."""
    base = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=6).digest())
    return [sampling.num_samples] * number, [base + i * sampling.num_samples for i in range(number)]
