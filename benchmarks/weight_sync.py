"""Weight push of a 0.5B Qwen2.5 shape (bf16, tied, 988 MB) from two trainer ranks into one and two CPU servers.

Prints seconds by phase, their ratio to a memcpy of the same bytes between the same pushes, how long the trainer stalls
(alone, and when it updates its EMA anchor meanwhile, as the RL loop does), and the peaks of private memory that pushes
add to a trainer rank and to a server's process. Needs about 10 GB of memory.
`python -m benchmarks.weight_sync [--layouts tp2 pp2] [--transports collective shm tcp]`; a server keeps the memory that
it once had, so the transport that is to be measured comes first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_t1.models.weight_map import Piece
from megatron_t1.push.sync import WeightSync
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers, open_servers
from tests.tiny import make_tiny_tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 896, 24, 14, 2, 4864, 151936
PUSHES = 5


def shapes() -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Hugging Face name -> shape and the dimension that tensor parallelism cuts."""
    kv = HIDDEN // HEADS * KV_HEADS
    result: dict[str, tuple[tuple[int, ...], int | None]] = {"model.embed_tokens.weight": ((VOCAB, HIDDEN), 0)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        result |= {
            f"{at}input_layernorm.weight": ((HIDDEN,), None),
            f"{at}self_attn.q_proj.weight": ((HIDDEN, HIDDEN), 0),
            f"{at}self_attn.k_proj.weight": ((kv, HIDDEN), 0),
            f"{at}self_attn.v_proj.weight": ((kv, HIDDEN), 0),
            f"{at}self_attn.q_proj.bias": ((HIDDEN,), 0),
            f"{at}self_attn.k_proj.bias": ((kv,), 0),
            f"{at}self_attn.v_proj.bias": ((kv,), 0),
            f"{at}self_attn.o_proj.weight": ((HIDDEN, HIDDEN), 1),
            f"{at}post_attention_layernorm.weight": ((HIDDEN,), None),
            f"{at}mlp.gate_proj.weight": ((INTERMEDIATE, HIDDEN), 0),
            f"{at}mlp.up_proj.weight": ((INTERMEDIATE, HIDDEN), 0),
            f"{at}mlp.down_proj.weight": ((HIDDEN, INTERMEDIATE), 1),
        }
    return result | {"model.norm.weight": ((HIDDEN,), None)}


def pieces_of(layout: str, rank: int) -> list[Piece]:
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for i, (name, (shape, dim)) in enumerate(shapes().items()):
        index = [slice(0, n) for n in shape]
        if layout == "tp2" and dim is not None:
            half = shape[dim] // 2
            index[dim] = slice(rank * half, (rank + 1) * half)
        if layout == "pp2" and name != "model.embed_tokens.weight" and (i > len(shapes()) // 2) != bool(rank):
            continue
        local = tuple(s.stop - s.start for s in index)
        view = torch.randn(local, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()
        pieces.append(Piece(name=name, shape=shape, index=tuple(index), view=view))
    return pieces


class Memcpy:
    """Seconds of copying as many bytes as a push has, one thread, pages already touched."""

    def __init__(self, num_bytes: int) -> None:
        self.source, self.target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))

    def seconds(self) -> float:
        began = time.perf_counter()
        self.target.copy_(self.source)
        return time.perf_counter() - began


def train(rank: int, world_size: int, store: str, layout: str, cfg: RolloutConfig, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    servers = Servers(cfg, "", "").start().wait_ready() if rank == 0 else None
    pieces = pieces_of(layout, rank)
    anchor = [piece.view.float() for piece in pieces]
    with WeightSync(pieces, cfg, servers) as sync:
        memcpy = Memcpy(sync.layout.num_bytes if rank == 0 else 1)
        copies, reports, anchor_s, beside = [], [], [], []
        first = sync.push(sync.next_version())
        for _ in range(PUSHES):
            copies.append(memcpy.seconds())
            dist.barrier()
            reports.append(sync.push(sync.next_version()))
            dist.barrier()
            sync.begin_push(sync.next_version())
            began = time.perf_counter()
            for average, piece in zip(anchor, pieces, strict=True):
                average.lerp_(piece.view.float(), 0.01)
            anchor_s.append(time.perf_counter() - began)
            beside.append(sync.finish_push().stall_s)
        with PeakMemory(os.getpid()) as memory:
            sync.push(sync.next_version())
        extra = torch.tensor([memory.extra])
        dist.all_reduce(extra, dist.ReduceOp.MAX)
        if rank == 0:
            report = sorted(reports, key=lambda r: r.total_s)[PUSHES // 2]
            result = {
                "layout": f"{layout} {cfg.transport}",
                "servers": len(servers.all),
                "num_bytes": sync.layout.num_bytes,
                "memcpy_s": statistics.median(copies),
                "first_s": first.total_s,
                "total_s": report.total_s,
                "all_s": [r.total_s for r in reports],
                "stall_s": report.stall_s,
                "anchor_s": statistics.median(anchor_s),
                "stall_beside_s": statistics.median(beside),
                "seconds": report.seconds,
                "extra_bytes": int(extra),
            }
            Path(out).write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


class PeakMemory:
    """What the private resident bytes of a process, or of any process of its group, grow by at most, sampled: pages of
    the shared file are nobody's own."""

    def __init__(self, pid: int, *, group: bool = False) -> None:
        self._pids = [pid]
        if group:
            numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
            self._pids = [number for number in numbers if _group_of(number) == pid]

    def __enter__(self) -> PeakMemory:
        self._start = self._now()
        self.start, self.extra = max(self._start), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            grown = [now - start for now, start in zip(self._now(), self._start, strict=True)]
            self.extra = max(self.extra, *grown)

    def _now(self) -> list[int]:
        return [_private_bytes(pid) for pid in self._pids]


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _private_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def loading_s(run_dir: Path) -> float:
    """Median seconds that the slowest server spent in vLLM's own loading and packing, from its log.

    A tied head is packed when the update is finished, everything else when it is loaded: while it arrives, over the
    collective transport.
    """
    medians = []
    for log in run_dir.glob("logs/*.log"):
        text = log.read_text()
        steps = [
            re.findall(rf"weights {word} in ([\d.]+) s", text)[-2 * PUSHES :]
            for word in ("(?:received and )?loaded", "finished")
        ]
        medians.append(statistics.median(float(load) + float(pack) for load, pack in zip(*steps, strict=True)))
    return max(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="+", default=["tp2", "pp2"], choices=["tp1", "tp2", "pp2"])
    parser.add_argument("--transports", nargs="+", default=["collective", "shm", "tcp"])
    parser.add_argument("--servers", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        model = Path(tmp) / "model"
        model.mkdir()
        make_tiny_tokenizer(model)
        config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": INTERMEDIATE,
            "vocab_size": VOCAB,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "torch_dtype": "bfloat16",
        }
        (model / "config.json").write_text(json.dumps(config))
        for num_servers in args.servers:
            cfg = RolloutConfig(
                device="cpu",
                num_servers=num_servers,
                dtype="bfloat16",
                max_model_len=1024,
                vllm_args={"load-format": "dummy"},
            )
            run_dir = Path(tmp) / f"run{num_servers}"
            with open_servers(cfg, model, run_dir) as servers:
                urls = tuple(server.url for server in servers.all)
                for transport, layout in itertools.product(args.transports, args.layouts):
                    joined = RolloutConfig(
                        urls=urls, key_file=str(run_dir / "server_key"), device="cpu", transport=transport
                    )
                    name = f"{layout}-{transport}-{num_servers}"
                    world_size = 1 if layout == "tp1" else 2
                    train_args = (world_size, f"{tmp}/store-{name}", layout, joined, f"{tmp}/{name}.json")
                    with PeakMemory(servers.all[0].process.pid, group=True) as memory:
                        torch.multiprocessing.spawn(train, train_args, world_size)
                    row = json.loads(Path(f"{tmp}/{name}.json").read_text())
                    row["outside_s"] = row["total_s"] - row["seconds"]["finish"] - loading_s(run_dir)
                    row |= {"server_bytes": memory.start, "server_extra_bytes": memory.extra}
                    rows.append(row)
                    print(json.dumps(rows[-1]), flush=True)
    phases = ["write", "ranks", "start", "receive", "pause", "load", "meet", "stream", "finish"]
    head = [
        "layout, transport, servers",
        "memcpy s",
        "total s",
        "x memcpy",
        "outside x",
        "first s",
        "stall s",
        "stall s beside the anchor",
        "anchor s",
        "extra MiB, rank",
        "server",
        *phases,
    ]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        seconds = " | ".join(f"{row['seconds'].get(phase, 0):.3f}" for phase in phases)
        memcpy, total = row["memcpy_s"], row["total_s"]
        print(
            f"| {row['layout']}, {row['servers']} | {memcpy:.3f} | {total:.2f} | {total / memcpy:.1f} | "
            f"{row['outside_s'] / memcpy:.1f} | {row['first_s']:.2f} | {row['stall_s']:.3f} | "
            f"{row['stall_beside_s']:.3f} | {row['anchor_s']:.3f} | "
            f"{row['extra_bytes'] / 2**20:.0f} | {row['server_extra_bytes'] / 2**20:.0f} | {seconds} |"
        )


if __name__ == "__main__":
    main()
