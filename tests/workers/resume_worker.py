"""SFT to `total` steps on a given layout, `fresh`, to `resume`, also at a `slower` rate, or `stopped` by USR1 to rank 0
in its fourth step."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path


def main() -> None:
    run_dir, model_dir, layout, total, every, resume = sys.argv[1:]
    from megatron_t1 import sft
    from megatron_t1.config import Config, SFTConfig
    from megatron_t1.engine.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize, is_main
    from megatron_t1.platform.detect import setup
    from megatron_t1.stop import STOP, Stopped
    from tests.engine.batch import make_sequences
    from tests.workers.stopped_worker import ask_in_step

    platform = setup()
    parallel = ParallelConfig(max_tokens_per_microbatch=96, **json.loads(layout))
    initialize(parallel, platform, 0)
    lr = 1e-5 if resume == "slower" else 1e-3
    cfg = Config(
        model=ModelConfig(hf_path=model_dir, dtype="float32"),
        run_dir=run_dir,
        resume=resume in ("resume", "slower"),
        resume_with_changes=resume == "slower",
        parallel=parallel,
        sft=SFTConfig(
            batch_size=8, epochs=99, max_steps=int(total), checkpoint=CheckpointConfig(every_steps=int(every), keep=9),
            optim=OptimConfig(lr=lr, schedule="cosine" if int(total) > 2 else "constant", warmup_steps=2),
        ),
    )  # fmt: skip
    if resume == "stopped":
        STOP.install()
        if is_main():
            ask_in_step(4)
        with contextlib.suppress(Stopped):
            sft.train(cfg, platform, make_sequences(vocab_size=321))
            raise AssertionError("it went on")
        return
    sft.train(cfg, platform, make_sequences(vocab_size=321))
    assert Path(run_dir, "sft/hf/model.safetensors").exists()


if __name__ == "__main__":
    main()
