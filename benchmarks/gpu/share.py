"""What the trainer gives of a shared GPU while servers generate (`parallel.offload`): how much, how fast, and that no
number of the training depends on it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.results import Check, free_memory, relative, synchronize
from benchmarks.gpu.trainer import QWEN_32B, TINY, engine_of, num_targets, qwen2_folder, random_sequences, start
from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.loss import t1_token_loss
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.config import AnchorConfig
from megatron_t1.engine.offload import Offload
from megatron_t1.engine.prescore import prescore

STEPS = 3
KEPT = {"none": 24, "optimizer": 2, "all": 0}
"""Bytes a parameter: bfloat16 weights, gradients, float32 weights and moments, the anchor's average and copy."""


def share(check: Check) -> None:
    """Two layers at the width of Qwen2.5-32B, with anchor: 1.3e9 parameters, 31 GB."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # the attention's backward pass else adds in any order
    platform = start()
    sizes = {**(TINY if check.smoke else QWEN_32B), "layers": 2, "vocab": 512 if check.smoke else 32768}
    num_tokens, length = (128, 64) if check.smoke else (4096, 512)
    folder = qwen2_folder(check.work / "hf", **sizes)
    sequences = random_sequences(sizes["vocab"], num_tokens, length)
    loss = LossConfig()
    first: list[torch.Tensor] = []
    for kind in ("none", "optimizer", "all"):
        with check.case(kind):
            free_memory()
            engine = engine_of(platform, folder, max_tokens=num_tokens, lr=1e-5, temperature=1.2, load=False)
            engine.parallel = replace(engine.parallel, offload=kind)
            anchor = Anchor(engine, AnchorConfig())
            offload = Offload(engine, anchor)
            memory: dict[str, Any] = {}
            seconds: dict[str, list[float]] = {"give": [], "take": []}
            for _ in range(STEPS):
                memory["before"] = _gigabytes()
                seconds["give"].append(_seconds(offload.give))
                memory["given"] = _gigabytes()
                seconds["take"].append(_seconds(offload.take))
                microbatches = engine.pack(sequences)
                prescore(engine, anchor, microbatches, sequences, loss)
                engine.step(
                    microbatches, num_targets(sequences), partial(t1_token_loss, cfg=loss), anchor.chunks
                )  # fmt: skip
                anchor.update()
            state = [tensor.detach().float().cpu() for tensor in (*engine.tensors(), *anchor.average)]
            first = first or state
            differ = [relative(a, b) for a, b in zip(first, state, strict=True) if not torch.equal(a, b)]
            moved = offload.host_bytes / 1e9
            numbers = sum(param.numel() for chunk in engine.chunks for param in chunk.parameters())
            kept = KEPT[kind] * numbers / 1e9
            check.report(
                kind,
                not differ and (check.smoke or memory["given"]["allocated"] < kept + 1.5),
                steps_differ=differ,
                kept_gb_by_the_estimate=round(kept, 2),
                gigabytes=memory,
                moved_gb=round(moved, 2),
                # The first one pins the host's memory, the second one more: the optimizer has its moments by then.
                seconds={name: [round(value, 3) for value in values] for name, values in seconds.items()},
                gb_per_s={name: round(moved / values[-1], 1) for name, values in seconds.items()},
            )
            del engine, anchor, offload, microbatches, state


def _seconds(call: Any) -> float:
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def _gigabytes() -> dict[str, float]:
    """By torch's allocator, and what the device says is taken by all of its processes."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    taken = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "gpu": total - free}
    return {name: round(value / 1e9, 2) for name, value in taken.items()}
