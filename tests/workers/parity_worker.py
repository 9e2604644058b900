"""Every family on every layout of one number of ranks: logits, the exported folder, and a clipped step with its
gradients and norm, for the tests.

argv: folder of the checkpoints, folder for the results, {layout: [ParallelConfig fields, [family, ...]]} as JSON. With
the distributed optimizer a layout saves a checkpoint; `checkpoint_of` another layout loads and exports that;
`model` has ModelConfig's fields.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences
from tests.workers.gradients import gradient_pieces

LR = 0.1
CLIP_GRAD = 0.05
"""Below every family's gradient norm."""
ADAM_EPS = 1e-2
"""So far above the clipped gradients that a step shows their scale."""


def all_logits(engine, microbatches) -> dict[str, torch.Tensor]:
    """Sample number -> the logits that predict its response, whole, on every rank."""
    from megatron_t1.algo.head.layout import select

    def local(hidden, head, microbatch):
        logits = select(hidden, head, microbatch.target_positions) @ head.weight[: head.num_rows].T
        positions = microbatch.position_ids[microbatch.target_positions]
        return head.vocab_start, microbatch.sample_index.tolist(), positions.tolist(), logits.float().cpu().numpy()

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, engine.map_hidden(engine.chunks, microbatches, local))
    columns = defaultdict(lambda: defaultdict(dict))
    for start, samples, positions, logits in (part for parts in everyone for part in parts):
        for sample, position, row in zip(samples, positions, logits, strict=True):
            columns[str(sample)][position][start] = torch.from_numpy(row)
    return {
        sample: torch.stack([torch.cat([parts[start] for start in sorted(parts)]) for _, parts in sorted(rows.items())])
        for sample, rows in columns.items()
    }


def main() -> None:
    checkpoints, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    platform = setup()
    from megatron.core import parallel_state as mpu

    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine import checkpoint, saving
    from megatron_t1.engine.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.step import Engine
    from megatron_t1.weights.plan import Plan

    for layout, (fields, families) in layouts.items():
        resumed, model = fields.pop("checkpoint_of", None), fields.pop("model", {})
        parallel = ParallelConfig(**{"max_tokens_per_microbatch": 120, "distributed_optimizer": False, **fields})
        initialize(parallel, platform, 0)
        for family in families:
            folder, result = checkpoints / family, out / layout / family
            engine = Engine(
                ModelConfig(hf_path=str(folder), **{"dtype": "float32", **model}), parallel,
                OptimConfig(lr=LR, clip_grad=CLIP_GRAD, adam_eps=ADAM_EPS), platform, total_steps=2, temperature=1.0,
            )  # fmt: skip
            if resumed:
                checkpoint.load(out / resumed / family / "checkpoints/step_00000001", engine, None)
                engine.save_hf(result)
                continue
            engine.load_weights(folder)
            sequences = make_sequences(engine.spec.vocab_size)
            microbatches = engine.pack(sequences)
            results = {f"logits/{sample}": logits for sample, logits in all_logits(engine, microbatches).items()}
            engine.save_hf(result)
            metrics = engine.step(microbatches, sum(len(s.response_ids) for s in sequences), sft_token_loss)
            results["norm"] = torch.tensor(metrics["grad_norm"], dtype=torch.float64)
            results |= {f"after/{name}": tensor.clone() for name, tensor in Plan(engine.pieces()).gather()}
            if not parallel.distributed_optimizer:  # else a rank's gradient buffer holds its own shard only
                results |= {f"grad/{name}": grad for name, grad in Plan(gradient_pieces(engine)).gather()}
            if dist.get_rank() == 0:
                save_file(results, result / "results")
            if parallel.distributed_optimizer:
                cfg = CheckpointConfig()
                saving.begin(result / "checkpoints", 1, engine, None, {}, cfg, score=0.0).finish()
        mpu.destroy_model_parallel()


if __name__ == "__main__":
    main()
