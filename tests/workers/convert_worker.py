"""Megatron's own loading and saving of the checkpoints that `t1 convert` makes and reads, on several layouts.

argv: folder with `<family>/megatron`, {layout: [ParallelConfig fields, [family, ...]]} as JSON. Leaves, beside each
checkpoint, `<layout> by megatron` and `<layout> by us`, exported after loading in either way, and for the first family
of a layout `<layout> saved`, by Megatron.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_t1.platform.detect import setup


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    platform = setup()
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_t1.engine.config import ModelConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize, is_main
    from megatron_t1.engine.step import ForwardEngine

    for layout, (fields, families) in layouts.items():
        parallel = ParallelConfig(**fields)
        initialize(parallel, platform, 0)
        for family in families:
            checkpoint = folder / family / "megatron"
            model = ModelConfig(hf_path=str(checkpoint), dtype="float32")
            engine = ForwardEngine(model, parallel, platform, temperature=1.0)
            state = engine.chunks[0].sharded_state_dict()
            weights = {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}
            engine.chunks[0].load_state_dict(dist_checkpointing.load(weights, str(checkpoint)), strict=False)
            engine.save_hf(folder / family / f"{layout} by megatron")
            for parameter in engine.chunks[0].parameters():
                parameter.data.zero_()
            engine.load_weights(checkpoint)
            engine.save_hf(folder / family / f"{layout} by us")
            if family == families[0]:
                saved = folder / family / f"{layout} saved"
                if is_main():
                    saved.mkdir()
                dist.barrier()
                dist_checkpointing.save({"model": engine.chunks[0].sharded_state_dict()}, str(saved))
        dist.barrier()
        mpu.destroy_model_parallel()


if __name__ == "__main__":
    main()
