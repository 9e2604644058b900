"""A trainer whose checkpoint is slow to write: each writer sleeps before its first tensor; or dies there.

argv: folder of the model, folder for the checkpoint, sleep | step | die. `step` takes one while the writers sleep a
second, and then loads what they wrote.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences


def main() -> None:
    model_dir, folder, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    platform = setup()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine import checkpoint, saving
    from megatron_t1.engine.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.step import Engine

    parallel = ParallelConfig()
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=str(model_dir), dtype="float32")
    engine = Engine(model, parallel, OptimConfig(lr=1e-3), platform, total_steps=1, temperature=1.0)
    engine.load_weights(model_dir)
    sequences = make_sequences(engine.spec.vocab_size)

    def step() -> list[torch.Tensor]:
        engine.step(engine.pack(sequences), sum(len(s.response_ids) for s in sequences), sft_token_loss)
        return [tensor.detach().clone() for tensor in engine.tensors()]

    saved, write = step(), filesystem_async._write_item

    @functools.wraps(write)  # Megatron looks at its signature
    def hindered(*arguments: Any, **options: Any) -> Any:
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if what == "sleep" else 0.1)
        return write(*arguments, **options)

    filesystem_async._write_item = hindered
    saver = saving.Saver(folder, CheckpointConfig())
    saver.begin(1, engine, None, {}, score=0.0)
    if what == "step":
        moved = step()
        assert not any(map(torch.equal, saved, moved))
        assert not saver.finish(wait=False), "a tenth of a second for each tensor is over already"
    saver.finish()
    checkpoint.load(folder / "step_00000001", engine, None)
    assert all(map(torch.equal, saved, engine.tensors()))


if __name__ == "__main__":
    main()
