"""Fixtures shared by the test files: a tiny model and one real vLLM server on it for the whole session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers, open_servers
from tests.tiny import make_tiny_qwen2

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with tied embeddings, float32, vocabulary 320 (tests.tiny)."""
    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One vLLM server on `tiny_dir`. Tests push weights into it: assume nothing about what it holds at first."""
    cfg = RolloutConfig(device="cpu", dtype="float32", max_model_len=512, sync_timeout_s=60)
    with open_servers(cfg, tiny_dir, tmp_path_factory.mktemp("server")) as servers:
        yield servers
