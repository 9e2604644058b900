"""How long a checkpoint holds the training up, beside how long it takes to be written: one rank on the CPU.

    python -m benchmarks.checkpoint [--out runs/checkpoint]

The training waits in `begin` (the optimizer's state is put together on the host, writers are forked) and in `finish`
(metadata, names); in between it takes steps.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.trainer import engine_of, num_targets, qwen2_folder, random_sequences, start
from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.loss import t1_token_loss
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.config import AnchorConfig, CheckpointConfig
from megatron_t1.engine.saving import Saver, num_bytes

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint"), help="on the disk that is measured")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    shutil.rmtree(asked.out, ignore_errors=True)
    folder = qwen2_folder(asked.out / "hf", layers=12, vocab=32768, **SIZES)
    engine = engine_of(start(), folder, dtype="float32", max_tokens=256, lr=1e-5, load=False)
    anchor = Anchor(engine, AnchorConfig())
    sequences = random_sequences(32768, 256, 128)
    loss = partial(t1_token_loss, cfg=LossConfig(kl_coef=0.0))

    def step() -> float:
        began = time.perf_counter()
        engine.step(engine.pack(sequences), num_targets(sequences), loss)
        return time.perf_counter() - began

    step()
    alone = statistics.median(step() for _ in range(3))
    saver = Saver(asked.out / "checkpoints", CheckpointConfig())
    print(f"{num_bytes(engine, anchor) / 1e9:.2f} GB a checkpoint; a step takes {alone:.2f} s\n")
    print("| begin, s | finish, s | steps meanwhile | s each | begun to finished, s | held up |")
    print("|---|---|---|---|---|---|")
    for turn in range(1, asked.turns + 1):
        began = time.perf_counter()
        saver.begin(turn, engine, anchor, {}, score=0.0)
        begun = time.perf_counter()
        steps = [step()]
        while not saver.finish(wait=False):
            steps.append(step())
        ended = time.perf_counter()
        finish = ended - begun - sum(steps)
        held = (begun - began + finish) / (ended - began)
        print(
            f"| {begun - began:.2f} | {finish:.2f} | {len(steps)} | {statistics.mean(steps):.2f} | {ended - began:.2f} "
            f"| {100 * held:.0f}% |",
            flush=True,
        )


if __name__ == "__main__":
    main()
