"""One step, a checkpoint, and what a new engine has loaded of it; rank 0 prints the largest differences as JSON.

argv: folder of the model, folder of the checkpoints, precision, ParallelConfig's fields as JSON, numbers in a bucket of
gradients (0: Megatron's own size), the anchor's decay.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences


def optimizer_state(engine) -> list[torch.Tensor]:
    """Float32 weights, both moments and the step's number, of every parameter's part on this rank."""
    tensors = []
    for part in engine.optimizer.chained_optimizers:
        for param in (param for group in part.optimizer.param_groups for param in group["params"]):
            state = part.optimizer.state[param]
            tensors += [param.detach(), *(state[name] for name in sorted(state))]
    return tensors


def main() -> None:
    model_dir, folder, dtype, layout, bucket_size, decay = sys.argv[1:]
    platform = setup()
    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine import checkpoint, model, saving
    from megatron_t1.engine.anchor import Anchor
    from megatron_t1.engine.config import AnchorConfig, CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.step import Engine

    parallel = ParallelConfig(**json.loads(layout))
    initialize(parallel, platform, 0)
    ddp_config = model.DistributedDataParallelConfig
    model.DistributedDataParallelConfig = partial(ddp_config, bucket_size=int(bucket_size) or None)

    def build() -> tuple[Engine, Anchor]:
        engine = Engine(
            ModelConfig(hf_path=model_dir, dtype=dtype), parallel, OptimConfig(lr=1e-3), platform,
            total_steps=9, temperature=1.0,
        )  # fmt: skip
        return engine, Anchor(engine, AnchorConfig(decay=float(decay)))

    sequences = make_sequences(vocab_size=321)

    def step(engine: Engine, anchor: Anchor) -> None:
        engine.step(engine.pack(sequences), sum(len(s.response_ids) for s in sequences), sft_token_loss)
        anchor.update()

    def state(engine: Engine, anchor: Anchor) -> dict[str, list[torch.Tensor]]:
        return {
            "logprobs": [torch.from_numpy(values) for values in engine.logprobs(sequences)],
            "optimizer": [tensor.clone() for tensor in optimizer_state(engine)],
            "average": [tensor.clone() for tensor in anchor.average],
        }

    engine, anchor = build()
    engine.load_weights(Path(model_dir))
    anchor.reset()
    step(engine, anchor)
    path = saving.begin(Path(folder), 1, engine, anchor, {}, CheckpointConfig(), score=0.0).finish()
    resumed, resumed_anchor = build()
    checkpoint.load(path, resumed, resumed_anchor)
    differences = {"num_buckets": sum(len(buffer.buckets) for ddp in engine.ddp for buffer in ddp.buffers)}
    other = Anchor(resumed, AnchorConfig(decay=0.5 if float(decay) == 1 else 1.0))
    checkpoint.load(path, resumed, other)
    parted = [(one - two).abs().max().item() for one, two in zip(anchor.weights, other.weights, strict=True)]
    differences["anchor of another decay"] = max(parted)
    for moment in ("loaded", "a step later"):
        before, after = state(engine, anchor), state(resumed, resumed_anchor)
        for name, tensors in before.items():
            pairs = zip(tensors, after[name], strict=True)
            worst = torch.stack([(one.float() - other.float()).abs().max() for one, other in pairs]).max()
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            differences[f"{name} {moment}"] = worst.item()
        for trained in ((engine, anchor), (resumed, resumed_anchor)):
            step(*trained)
    if dist.get_rank() == 0:
        print(json.dumps(differences))


if __name__ == "__main__":
    main()
