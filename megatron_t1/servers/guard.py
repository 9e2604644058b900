"""ASGI middleware: no route of the server without the key, except /health, and /metrics for this host.

vLLM's own `--api-key` guards /v1, /v2, /inference and /cohere only; with the developer routes on, the weight routes,
/pause, /collective_rpc and /invocations would be open to everybody who reaches the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY_ENV = "VLLM_API_KEY"

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]


class KeyGuard:
    """Answers 401 unless the request carries `Authorization: Bearer <key>`; every method, websockets too."""

    def __init__(self, app: ASGIApp) -> None:
        key = os.environ.get(KEY_ENV, "")
        if not key:
            raise RuntimeError(f"{KEY_ENV} is not set: the server would be open to everybody who reaches its port")
        self.app = app
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            return await self.app(scope, receive, send)
        if scope.get("path") == "/metrics" and (scope.get("client") or ("",))[0].startswith("127."):
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
        return await send({"type": "http.response.body", "body": b"the server's key is missing or wrong\n"})
