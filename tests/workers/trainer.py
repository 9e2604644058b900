"""Two trainer ranks: each holds its cut of a Hugging Face folder and pushes it into a running server.

argv: RolloutConfig's fields, [[layout, folder, version], ...], both as JSON; the file for what the server then says. A
layout that ends in `tcp` or `collective` travels by it. The last rank dies in `killed` before it has written, and in
`killed in tcp` (or `collective`) when it has sent a part of what it owns; rank 0 then writes the error and ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from megatron_t1.models.weight_map import Piece
from megatron_t1.push import tcp, transports
from megatron_t1.push.group import Group, Invitation
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


def die(transport: str) -> None:
    """SIGKILL, at once or when this rank is about to send its fifth chunk over TCP, or to take part in the fifth
    broadcast."""
    if transport == "shm":
        os.kill(os.getpid(), signal.SIGKILL)
    owner, name = {"tcp": (tcp, "bytes_of"), "collective": (Group, "broadcast")}[transport]
    sends, count = getattr(owner, name), itertools.count(1)

    def send_or_die(*arguments: object) -> object:
        if next(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return sends(*arguments)

    setattr(owner, name, send_or_die)


def main() -> None:
    fields, pushes, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    cfg = RolloutConfig(**fields)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    servers = Servers(cfg, "", "").start().wait_ready() if rank == 0 else None
    transports.Invitation = partial(Invitation, bucket_bytes=16 << 10)
    results = []
    for layout, folder, version in pushes:
        pieces = pieces_of(layout, Path(folder), rank)
        transport = next((word for word in ("tcp", "collective") if word in layout), "shm")
        if servers is not None:
            servers.cfg = dataclasses.replace(cfg, transport=transport)
        with WeightSync(pieces, cfg, servers) as sync:
            if layout.startswith("killed"):
                if rank == world_size - 1:
                    die(transport)
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
