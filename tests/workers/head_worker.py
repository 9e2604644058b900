"""Every path of the head on the ranks that this is started on, with and without sequence parallelism.

argv: folder in which each rank leaves what it got, as `<number of ranks>.<rank>.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_t1.algo.config import CHUNK_LOGITS
from megatron_t1.algo.head.layout import Head
from megatron_t1.platform.detect import setup
from tests.algo.reference import PATHS, case

S, VOCAB, PADDED, TEMPERATURE = 64, 601, 1024, 0.8


def one_case():
    return case(s=S, hidden_size=32, vocab_size=VOCAB, padded_size=PADDED, num_targets=37)


def main() -> None:
    folder, rank, tp = Path(sys.argv[1]), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{tp}", rank=rank, world_size=tp)
    # Small tiles and chunks; the last rank of four holds nothing but padding rows.
    CHUNK_LOGITS[setup().device.type] = 2000
    rows = slice(rank * PADDED // tp, (rank + 1) * PADDED // tp)
    results = {}
    for sequence_parallel in (False, True):
        part = slice(rank * S // tp, (rank + 1) * S // tp) if sequence_parallel else slice(0, S)
        for path in PATHS:
            c = one_case()
            hidden, weight = (t.clone().requires_grad_() for t in (c.hidden[part], c.weight[rows]))
            c.anchor_hidden, c.anchor_weight = c.anchor_hidden[part], c.anchor_weight[rows]
            head = Head(
                weight=weight,
                vocab_start=rows.start,
                vocab_size=VOCAB,
                temperature=TEMPERATURE,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
            )
            loss, metrics = path.loss(hidden, head, c)
            (loss * 3).backward()
            values = path.values(hidden, head, c)
            results[f"{path}, SP {sequence_parallel}"] = {
                "values": torch.stack(values),
                "loss": loss.detach(),
                "sums": metrics.sums,
                "d_hidden": hidden.grad,
                "d_weight": weight.grad,
            }
    torch.save(results, folder / f"{tp}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
