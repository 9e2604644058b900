"""A small HTTP server that answers like vLLM, or as it likes: what no real server can be made to do on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def good_reply(request: dict[str, Any]) -> dict[str, Any]:
    """Two tokens a sample, as `/inference/v1/generate` answers."""
    return {
        "choices": [
            {
                "index": i,
                "finish_reason": "stop",
                "token_ids": [7, 8],
                "weight_versions": [{"version": "default", "start": 0, "end": 2}],
                "logprobs": {
                    "content": [
                        {"token_id": 7, "logprob": -1.0, "top_logprobs": [{"token_id": 7, "logprob": -1.0}]},
                        {"token_id": 8, "logprob": -2.0, "top_logprobs": [{"token_id": 8, "logprob": -2.0}]},
                    ]
                },
            }
            for i in range(request["sampling_params"]["n"])
        ]
    }


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any], host: str = "127.0.0.1"):
    """Serves `answer(request)` for every generation request on a free port of `host`; yields the URL.

    `answer` may return a dict (sent as JSON), bytes (sent as they are), an int (a status), both of these (status and
    body), or None (the connection is closed without an answer).
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, json.dumps({"data": [{"id": "policy", "max_model_len": 512}]}).encode())
            elif self.path == "/weight_info":
                self._send(200, b'{"weight_version": "default"}')
            elif self.path == "/is_paused":
                self._send(200, b'{"is_paused": false}')
            else:
                self._send(200, b"")

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = answer(request)
            if reply is None:
                self.close_connection = True
                self.connection.close()
            elif isinstance(reply, int):
                self._send(reply, b"{}")
            elif isinstance(reply, tuple):
                self._send(*reply)
            else:
                self._send(200, reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer((host, 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
