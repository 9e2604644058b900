"""Two trainer ranks: each holds its cut of a Hugging Face folder and pushes it into a running server.

argv: RolloutConfig's fields, [[layout, folder, version], ...], both as JSON; the file for what the server then says. A
layout that ends in `tcp` travels by it. The last rank dies in `killed` before it has written, and in `killed in tcp`
when it has sent a part of what it owns; rank 0 then writes the error and ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_t1.models.weight_map import Piece
from megatron_t1.push import tcp
from megatron_t1.push.ranks import SyncError
from megatron_t1.push.sync import WeightSync
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from tests.push import reference

PROMPT = [40, 50, 60, 70]
SAMPLING = SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=8)


class NoText:
    def decode(self, token_ids, skip_special_tokens=False) -> str:
        return ""


def pieces_of(layout: str, folder: Path, rank: int) -> list[Piece]:
    """Of two ranks. `pp2`: two stages, with the tied embedding on both; else tensor parallel, with replicated norms."""
    tensors = load_file(folder / "model.safetensors")
    if not layout.startswith("pp2"):
        return reference.tensor_parallel(tensors, rank, 2)
    keys = (["embed_tokens", "layers.0"], ["embed_tokens", "layers.1", "model.norm"])[rank]
    return reference.whole({name: t for name, t in tensors.items() if any(key in name for key in keys)})


def die(at_chunk: int) -> None:
    """SIGKILL, at once or when this rank is about to send its `at_chunk`-th chunk over TCP."""
    if at_chunk == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    chunks, count = tcp.bytes_of, itertools.count(1)

    def bytes_or_death(chunk: torch.Tensor) -> memoryview:
        if next(count) == at_chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return chunks(chunk)

    tcp.bytes_of = bytes_or_death


def main() -> None:
    fields, pushes, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    cfg = RolloutConfig(**fields)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    servers = Servers(cfg, "", "").start().wait_ready() if rank == 0 else None
    results = []
    for layout, folder, version in pushes:
        pieces = pieces_of(layout, Path(folder), rank)
        if servers is not None:
            servers.cfg = dataclasses.replace(cfg, transport="tcp" if "tcp" in layout else "shm")
        with WeightSync(pieces, cfg, servers) as sync:
            if layout.startswith("killed"):
                if rank == world_size - 1:
                    die(at_chunk=5 if layout == "killed in tcp" else 0)
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
                    "samples": [[s.token_ids.tolist(), s.logprobs.tolist(), s.weight_versions] for s in samples],
                }
            )
            out.write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
