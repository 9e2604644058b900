"""A trainer that writes a checkpoint and does not come to its end: each writer sleeps before its first tensor.

argv: folder of the model, folder for the checkpoint.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences


def main() -> None:
    model_dir, folder = map(Path, sys.argv[1:])
    platform = setup()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine import checkpoint
    from megatron_t1.engine.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.step import Engine

    parallel = ParallelConfig()
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=str(model_dir), dtype="float32")
    engine = Engine(model, parallel, OptimConfig(lr=1e-3), platform, total_steps=1, temperature=1.0)
    engine.load_weights(model_dir)
    sequences = make_sequences(engine.spec.vocab_size)
    engine.step(engine.pack(sequences), sum(len(s.response_ids) for s in sequences), sft_token_loss)
    filesystem_async._write_item = lambda *_, **__: time.sleep(600)
    checkpoint.save(folder, 1, engine, None, {}, CheckpointConfig(), score=0.0)


if __name__ == "__main__":
    main()
