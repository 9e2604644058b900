"""A trainer whose checkpoint is slow to write: each writer sleeps before its first tensor; or one dies there.

argv: folder of the model, folder for the checkpoint, sleep | step | die. `step` takes one while the writers sleep a
second, then loads what they wrote, tries again with a full disk, and at last without the model's folder. With `die` the
others say more than a pipe holds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
            if arguments[-1] == "__0_0.distcp":
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(write(*arguments, **options), storage_data=b"x" * 100_000)
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
    filesystem_async._write_item = write
    for full_for_writers in (True, False):
        with full_disk() if full_for_writers else contextlib.nullcontext():
            saver.begin(2, engine, None, {"much": "x" * 1_000_000}, score=0.0)
        with full_disk(), pytest.raises(OSError, match=r"step_00000002 could not be written .*File too large"):
            saver.finish()
        assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    engine.model_config = replace(model, hf_path=str(folder / "purged"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Stale file handle")

    saving._rotate = unreachable
    saver.begin(3, engine, None, {}, score=0.0)
    saver.finish()
    checkpoint.load(folder / "step_00000003", engine, None)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """For files of half a megabyte and more, of this process and its forks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    main()
