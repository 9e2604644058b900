"""Fine-tunes for three steps on five of nine examples. argv: folder of the run, model folder, layout as JSON."""

from __future__ import annotations

import json
import sys

from megatron_t1 import sft
from megatron_t1.config import Config, SFTConfig
from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.parallel import initialize
from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences

BATCHES = SFTConfig(
    batch_size=5, epochs=3, num_heldout=4, measure_every=2, optim=OptimConfig(lr=1e-2, schedule="constant")
)


def main() -> None:
    run_dir, model_dir, layout = sys.argv[1:]
    platform, parallel = setup(), ParallelConfig(max_tokens_per_microbatch=96, **json.loads(layout))
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=model_dir, dtype="float32")
    cfg = Config(model=model, run_dir=run_dir, parallel=parallel, sft=BATCHES)
    sft.train(cfg, platform, make_sequences(vocab_size=321))


if __name__ == "__main__":
    main()
