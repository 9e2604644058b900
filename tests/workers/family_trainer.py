"""Four Megatron ranks that live for a whole test file and push what they are told, on the layout that they are told."""

from __future__ import annotations

import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_t1.servers.config import RolloutConfig

NUM_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Push:
    folder: Path
    """The checkpoint that the ranks train, in float32."""
    fields: dict[str, Any]
    """Of ParallelConfig; what is left of the four ranks is data parallel."""
    cfg: RolloutConfig
    version: int
    export: Path
    """Where the trainer writes its weights as a Hugging Face folder."""


class Trainers:
    """The ranks, started at once and awaited by the first `push`."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._inboxes = [context.Queue() for _ in range(NUM_RANKS)]
        self._answers = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args = (port, self._inboxes, self._answers)
        self._processes = torch.multiprocessing.spawn(_work, args, nprocs=NUM_RANKS, join=False)

    def push(self, push: Push) -> None:
        for inbox in self._inboxes:
            inbox.put(push)
        errors = [self._answers.get(timeout=300) for _ in range(NUM_RANKS)]
        assert errors == [""] * NUM_RANKS, "\n".join(errors)

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        self._processes.join(timeout=60)


def _work(rank: int, port: int, inboxes: list[Any], answers: Any) -> None:
    size = str(NUM_RANKS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron.core import parallel_state as mpu

    from megatron_t1.platform.detect import setup

    platform = setup()
    for push in iter(inboxes[rank].get, None):
        try:
            _push(push, platform)
            answers.put("")
        except BaseException:
            answers.put(f"rank {rank}: {traceback.format_exc()}")
        mpu.destroy_model_parallel()


def _push(push: Push, platform: Any) -> None:
    from megatron_t1.engine.config import ModelConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize, is_main
    from megatron_t1.engine.step import ForwardEngine
    from megatron_t1.push.sync import WeightSync
    from megatron_t1.servers.servers import Servers

    parallel = ParallelConfig(**push.fields)
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=str(push.folder), dtype="float32")
    engine = ForwardEngine(model, parallel, platform, temperature=1.0)
    engine.load_weights(push.folder)
    engine.save_hf(push.export)
    servers = Servers(push.cfg, "", "").start().wait_ready() if is_main() else None
    with WeightSync(engine.pieces(), push.cfg, servers) as sync:
        assert sync.push(push.version).failed == {}
