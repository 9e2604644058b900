"""Pieces over TCP between two ends in one process: bytes, tokens, a rank that ends, and one that is silent."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_t1.models.weight_map import Piece
from megatron_t1.push import tcp
from megatron_t1.push.layout import Layout
from megatron_t1.push.tcp import PieceServer, fetch
from megatron_t1.servers.launch import own_address
from megatron_t1.weights.plan import Plan

TOKEN = "a-token"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Tensors of every kind: strewn in the trainer, strewn at the server, without dimensions, larger than a chunk."""
    monkeypatch.setattr(tcp, "CHUNK_BYTES", 4096)
    fused = torch.randn(4, 3, 8, 32)
    pieces = [
        Piece(name="q", shape=(64, 32), index=(slice(0, 64), slice(0, 32)), view=fused[:, :2]),
        Piece(name="k", shape=(32, 32), index=(slice(0, 32), slice(0, 32)), view=fused[:, 2]),
        Piece(name="rows", shape=(300, 32), index=(slice(0, 300), slice(0, 32)), view=torch.randn(300, 32)),
        Piece(name="left", shape=(6, 8), index=(slice(0, 6), slice(0, 4)), view=torch.randn(6, 4).bfloat16()),
        Piece(name="left", shape=(6, 8), index=(slice(0, 6), slice(4, 8)), view=torch.randn(6, 4).bfloat16()),
        Piece(name="scalar", shape=(), index=(), view=torch.tensor(3.5)),
    ]
    return Plan(pieces)


@contextlib.contextmanager
def served(plan: Plan, host: str = "127.0.0.1", timeout_s: float = 20) -> Iterator[PieceServer]:
    with PieceServer(Layout.of(plan).views(plan), host, TOKEN, timeout_s) as server:
        yield server


def fetched(plan: Plan, address: tuple[str, int], token: str = TOKEN, timeout_s: float = 20) -> dict[str, torch.Tensor]:
    layout = Layout.of(plan)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    fetch([(0, *address)], token, layout, buffer, timeout_s)
    return {tensor.name: tensor.view(buffer) for tensor in layout.tensors}


@pytest.mark.parametrize("host", ["127.0.0.1", "towards another host"])
def test_every_byte_arrives_whatever_the_strides(plan: Plan, host: str) -> None:
    if host != "127.0.0.1":
        try:
            host = own_address(towards="192.0.2.1")  # reserved for documentation; nothing is sent
        except OSError:
            pytest.skip("this host has no route to others")
        assert not host.startswith("127.")
    with served(plan, host) as server:
        for _ in range(2):  # as many workers as come
            got = fetched(plan, server.address)
            for name, tensor in plan.gather():
                assert torch.equal(got[name], tensor), name


def test_without_the_token_nothing_is_sent(plan: Plan) -> None:
    with served(plan) as server:
        with pytest.raises(ConnectionError, match=r"trainer rank 0 at 127.0.0.1:.*at q"):
            fetched(plan, server.address, token="wrong-t")


def test_a_rank_that_ends_is_named_with_the_tensor_under_way(plan: Plan) -> None:
    def end_within_k(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(len(TOKEN))
            connection.sendall(bytes(64 * 32 * 4 + 100))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(end_within_k, listener)
        with pytest.raises(ConnectionError, match=r"trainer rank 0 at .*, at k: EOFError\('the connection was closed"):
            fetched(plan, listener.getsockname()[:2])


def test_a_silent_rank_is_given_up_at_the_deadline(plan: Plan) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConnectionError, match=r"trainer rank 0 .*TimeoutError"):
            fetched(plan, silent.getsockname()[:2], timeout_s=0.2)


def test_nothing_reads_the_weights_after_close(plan: Plan) -> None:
    with served(plan) as server:
        address = server.address
        lingering = socket.create_connection(server.address, timeout=20)
        lingering.sendall(TOKEN.encode())
        lingering.recv(1)
    with lingering:
        received = 1
        while count := len(lingering.recv(1 << 16)):
            received += count
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=20)
