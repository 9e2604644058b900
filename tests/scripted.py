"""A real HTTP server that plays a chat endpoint: scripted answers, and trouble on purpose."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[dict[str, Any]], str]
TROUBLES = ("limit", "limit date", "error", "stall", "no json", "no choices", "null", "bad finish", "html", "reset")


class ScriptedEndpoint:
    """`answer(body)` decides the text. Each new request meets trouble first, with probability `trouble`.

    No answer is given before `crowd` requests have been in flight at the same time.
    """

    def __init__(
        self, answer: Answer, trouble: float = 0.0, delay_s: float = 0.0, key: str = "", crowd: int = 0
    ) -> None:
        self.answer, self.trouble, self.delay_s, self.key, self.crowd = answer, trouble, delay_s, key, crowd
        self.served: Counter[str] = Counter()
        """Requests answered well, by their body."""
        self.troubles: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.url = ""
        self._seen: Counter[str] = Counter()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._handle(request)
        finally:
            self.in_flight -= 1

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "no such key"}, status=401)
        body = await request.json()
        name = json.dumps(body, sort_keys=True)
        self._seen[name] += 1
        kind = random.Random(f"{name}{self._seen[name]}").choice(TROUBLES)
        if self._seen[name] <= 2 and random.Random(f"{self._seen[name]}{name}").random() < self.trouble:
            self.troubles[kind] += 1
            return await self._make_trouble(kind, request)
        await asyncio.sleep(self.delay_s)
        while self.most_in_flight < self.crowd:
            await asyncio.sleep(0.1)
        text = self.answer(body)
        self.served[name] += 1
        if text == "REFUSE":
            return web.json_response({"error": "this is too long"}, status=400)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(name) // 4, "completion_tokens": len(text) // 4 + 1 if text else 0}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})

    async def _make_trouble(self, kind: str, request: web.Request) -> web.StreamResponse:
        good = {"message": {"content": "x"}, "finish_reason": "stop"}
        if kind.startswith("limit"):
            after = "0.1" if kind == "limit" else "Wed, 21 Oct 2015 07:28:00 GMT"
            return web.json_response({}, status=429, headers={"Retry-After": after})
        if kind == "error":
            return web.json_response({}, status=500)
        if kind == "stall":
            await asyncio.sleep(20)
        if kind == "no json":
            return web.Response(text='{"choices": [')
        if kind == "html":
            return web.Response(text="<html>busy</html>", status=502)
        if kind == "reset" and request.transport:
            request.transport.abort()
        broken: dict[str, Any] = {
            "no choices": {"choices": []},
            "null": {"choices": [{**good, "message": {"content": None}}]},
            "bad finish": {"choices": [{**good, "finish_reason": "error"}]},
        }
        return web.json_response(broken.get(kind, {}))


@contextmanager
def serving(endpoint: ScriptedEndpoint) -> Iterator[ScriptedEndpoint]:
    """The endpoint on a free port of this machine, in a thread."""
    loop, started, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", endpoint.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield endpoint
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
