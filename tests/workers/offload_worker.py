"""Three steps with and without `parallel.offload`, one of them resumed; rank 0 prints what came out as JSON.

argv: folder of the model, folder of the checkpoints, precision, ParallelConfig's fields as JSON (offload is one).
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences


def optimizer_state(engine) -> list[torch.Tensor]:
    """Float32 weights and moments."""
    tensors = []
    for part in engine.optimizer.chained_optimizers:
        for param in (param for group in part.optimizer.param_groups for param in group["params"]):
            tensors += [param, part.optimizer.state[param]["exp_avg"], part.optimizer.state[param]["exp_avg_sq"]]
    return tensors


def held() -> int:
    """Bytes of all tensors of this process but the offload's own."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.dtype != torch.uint8:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    model_dir, folder, dtype, layout = sys.argv[1:]
    platform = setup()
    from megatron_t1.algo.config import LossConfig
    from megatron_t1.algo.loss import t1_token_loss
    from megatron_t1.engine import checkpoint, saving
    from megatron_t1.engine.anchor import Anchor
    from megatron_t1.engine.config import AnchorConfig, CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.offload import Offload
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.prescore import prescore
    from megatron_t1.engine.step import Engine

    parallel = ParallelConfig(**json.loads(layout))
    initialize(parallel, platform, 0)
    loss = LossConfig(entropy_coef=0.01, kl_coef=0.02)
    sequences = make_sequences(vocab_size=321)

    def build(parallel: ParallelConfig) -> tuple[Engine, Anchor, Offload]:
        engine = Engine(
            ModelConfig(hf_path=model_dir, dtype=dtype), parallel, OptimConfig(lr=1e-3), platform,
            total_steps=9, temperature=1.2,
        )  # fmt: skip
        engine.load_weights(Path(model_dir))
        anchor = Anchor(engine, AnchorConfig(decay=0.9))
        return engine, anchor, Offload(engine, anchor)

    def step(engine: Engine, anchor: Anchor, offload: Offload) -> dict[str, float]:
        offload.give()
        offload.give()
        offload.take()
        microbatches = engine.pack(sequences)
        kl = prescore(engine, anchor, microbatches, sequences, loss)
        num_targets = sum(len(s.response_ids) for s in sequences)
        metrics = engine.step(microbatches, num_targets, partial(t1_token_loss, cfg=loss), anchor.chunks)
        anchor.update()
        return metrics | kl

    def state(engine: Engine, anchor: Anchor, _: Offload) -> list[torch.Tensor]:
        return [*engine.tensors(), *optimizer_state(engine), *anchor.average, *anchor.weights]

    plain, given = build(replace(parallel, offload="none")), build(parallel)
    metrics = [[step(*one) for _ in range(2)] for one in (plain, given)]
    numbers = [param.numel() for chunk in plain[0].chunks for param in chunk.parameters()]
    # Where Transformer Engine's layers keep FP8 copies of their weights.
    given[0].chunks[0].decoder._fp8_workspaces = {"weight": torch.zeros(sum(numbers), dtype=torch.int8)}
    before = held()
    given[2].give()
    freed = before - held()
    asked = None
    if parallel.offload == "optimizer":  # its weights stay
        asked = [p.tolist() for p in given[0].logprobs(sequences)]
    given[2].take()
    if asked:
        asked = asked == [p.tolist() for p in plain[0].logprobs(sequences)]
    save = saving.begin(Path(folder), 2, given[0], given[1], {}, CheckpointConfig(), score=0.0)
    given[2].give()
    path = save.finish()
    given[2].take()
    resumed = build(parallel)
    resumed[2].give()
    resumed[2].take()
    checkpoint.load(path, resumed[0], resumed[1])
    metrics = [[*steps, step(*one)] for steps, one in zip(metrics, (plain, given), strict=True)]
    metrics.append([*metrics[0][:2], step(*resumed)])
    expected = state(*plain)
    mine = {
        "freed": freed,
        "parameters": sum(numbers),
        "asked": asked,
        "metrics": metrics[0] == metrics[1] == metrics[2],
        "differ": [
            [number for number, pair in enumerate(zip(expected, state(*one), strict=True)) if not torch.equal(*pair)]
            for one in (given, resumed)
        ],
    }
    everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


if __name__ == "__main__":
    main()
