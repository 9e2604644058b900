"""Trainer ranks as real processes: each holds its cut of a Hugging Face folder and pushes it into running servers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import RolloutConfig, SamplingConfig
from megatron_t1.rollout.server import Servers
from megatron_t1.weights.fanout import SyncError
from megatron_t1.weights.ops import Piece
from megatron_t1.weights.sync import WeightSync
from tests.weights import reference

PROMPT = [40, 50, 60, 70]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


class NoText:
    def decode(self, token_ids, skip_special_tokens=False) -> str:
        return ""


def pieces_of(layout: str, folder: Path, rank: int) -> list[Piece]:
    """`tp2`, `pp2`, or `tp2pp2` (4 ranks, tensor-parallel neighbours); norms are replicated, the embedding is tied."""
    tensors = load_file(folder / "model.safetensors")
    if layout == "tp2":
        return reference.tensor_parallel(tensors, rank, 2)
    stage = rank if layout == "pp2" else rank // 2
    first, last = ["embed_tokens", "layers.0"], ["embed_tokens", "layers.1", "model.norm"]
    mine = {name: t for name, t in tensors.items() if any(key in name for key in (first, last)[stage])}
    return reference.whole(mine) if layout == "pp2" else reference.tensor_parallel(mine, rank % 2, 2)


def train(
    rank: int, world_size: int, store: Path, cfg: RolloutConfig, pushes: list[tuple[str, Path, int]], out: Path
) -> None:
    """Pushes every (layout, folder, version); rank 0 writes what the servers then say.

    `gloo` is `tp2` by that transport. With `killed` the last rank dies while the others push, and rank 0 writes the
    error.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    servers = Servers(cfg, "", "").start().wait_ready() if rank == 0 else None
    results = []
    for layout, folder, version in pushes:
        pieces = pieces_of("tp2" if layout in ("gloo", "killed") else layout, folder, rank)
        if servers is not None:
            servers.cfg = dataclasses.replace(cfg, transport="gloo" if layout == "gloo" else "shm")
        with WeightSync(pieces, cfg, servers) as sync:
            if layout == "killed":
                if rank == world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    sync.push(version)
                except SyncError as error:
                    out.with_suffix(".error").write_text(str(error))
                os._exit(0)  # the group is broken: its destructor would wait for the dead rank
            report = sync.push(version)
        if servers is not None:
            with RolloutClient(servers, NoText(), vocab_size=320) as client:
                samples = client.complete_tokens([PROMPT], SAMPLING, seed=version)[0]
            results.append(
                {
                    "version": version,
                    "seconds": report.seconds,
                    "samples": [
                        [s.token_ids.tolist(), s.logprobs.tolist(), s.weight_versions, s.server] for s in samples
                    ],
                }
            )
            out.write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()
