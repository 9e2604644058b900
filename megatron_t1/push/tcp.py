"""Pieces over TCP, both ends: every trainer rank serves what it owns, every worker fetches from all ranks at once.

A connection carries the push's token from worker to trainer, then the bytes of that rank's pieces, in their order and
nothing else: both sides know the plan. A push gathers nothing: a rank reads its live parameters, at most CHUNK_BYTES of
them copied at a time (a piece whose numbers are strewn, as the queries of a fused QKV, is copied whole). Left out:
encryption. Whoever can listen on the network sees the weights; whoever lacks the token gets none.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from megatron_t1.push.layout import Layout, PieceSpec
from megatron_t1.weights.buffers import bytes_of

CHUNK_BYTES = 16 << 20
_MAX_FETCHES = 16


class TokenServer:
    """Answers whoever brings `token`, every connection on a thread of its own, from its construction until `close`."""

    def __init__(self, host: str, token: str, timeout_s: float) -> None:
        self._token = token.encode()
        self._timeout_s = timeout_s
        self._listener = socket.create_server((host, 0), backlog=128)
        self._connections: list[tuple[socket.socket, threading.Thread]] = []
        self._acceptor = threading.Thread(target=self._accept, name="pieces", daemon=True)
        self._acceptor.start()

    def _answer(self, connection: socket.socket) -> None:
        raise NotImplementedError

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Ends all connections; when it returns, none is answered any more."""
        _end(self._listener)
        self._acceptor.join()
        for connection, thread in self._connections:
            _end(connection)
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="pieces", daemon=True)
            self._connections.append((connection, thread))
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        # Who asks reports what went wrong: it is the one that misses bytes.
        with connection, contextlib.suppress(OSError, EOFError):
            connection.settimeout(self._timeout_s)
            given = bytearray(len(self._token))
            _receive(connection, memoryview(given))
            if hmac.compare_digest(given, self._token):
                self._answer(connection)


class PieceServer(TokenServer):
    """Serves one rank's pieces; once it is closed, nothing reads the weights any more."""

    def __init__(self, views: list[tuple[torch.Tensor, PieceSpec]], host: str, token: str, timeout_s: float) -> None:
        self._views = views
        super().__init__(host, token, timeout_s)

    def _answer(self, connection: socket.socket) -> None:
        for view, piece in self._views:
            for chunk in _chunks(view.reshape(piece.shape)):
                connection.sendall(bytes_of(chunk.detach().contiguous().cpu()))


def fetch(
    sources: Sequence[tuple[int, str, int]],
    token: str,
    layout: Layout,
    buffer: torch.Tensor,
    timeout_s: float,
) -> None:
    """Fills `buffer` from the trainer ranks at `sources` (rank, host, port).

    Raises:
        ConnectionError: a rank that can't be reached, ended or was silent; names it and the tensor that was under way.
    """

    def one(source: tuple[int, str, int]) -> None:
        rank, host, port = source
        at = "its first piece"
        try:
            with socket.create_connection((host, port), timeout=timeout_s) as connection:
                connection.sendall(token.encode())
                for piece in layout.of_rank(rank):
                    at = piece.tensor.name
                    for chunk in _chunks(piece.view(buffer)):
                        whole = chunk if chunk.is_contiguous() else torch.empty(chunk.shape, dtype=chunk.dtype)
                        _receive(connection, bytes_of(whole))
                        if whole is not chunk:
                            chunk.copy_(whole)
        except (OSError, EOFError) as error:
            raise ConnectionError(f"trainer rank {rank} at {host}:{port}, at {at}: {error!r}") from None

    with ThreadPoolExecutor(min(_MAX_FETCHES, len(sources))) as pool:
        for _ in pool.map(one, sources):
            pass


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is not connected any more
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it, as close alone would not
    sock.close()


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Runs of whole rows of at most CHUNK_BYTES (at least one row): the same on both sides."""
    if tensor.dim() == 0:
        tensor = tensor[None]
    row_bytes = tensor[0].numel() * tensor.element_size()
    yield from tensor.split(max(1, CHUNK_BYTES // row_bytes))


def _receive(connection: socket.socket, target: memoryview) -> None:
    while target:
        count = connection.recv_into(target)
        if count == 0:
            raise EOFError(f"the connection was closed, {len(target)} bytes of this chunk are missing")
        target = target[count:]
