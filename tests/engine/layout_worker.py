"""One RL step and one SFT step on a given layout; rank 0 writes losses, metrics, gradients and logprobs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_t1.platform import setup
from tests.engine.batch import TEMPERATURE, make_sequences
from tests.engine.gradients import gradient_pieces


def main() -> None:
    model_dir, out, layout = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    platform = setup()
    from megatron_t1.algo.loss import LossConfig, sft_token_loss, t1_token_loss
    from megatron_t1.engine.anchor import Anchor, AnchorConfig
    from megatron_t1.engine.model import ModelConfig
    from megatron_t1.engine.optimizer import OptimConfig
    from megatron_t1.engine.parallel import ParallelConfig, initialize
    from megatron_t1.engine.step import Engine
    from megatron_t1.weights.stream import Plan

    parallel = ParallelConfig(**layout)
    initialize(parallel, platform, 0)
    optim = OptimConfig(lr=1e-3, clip_grad=0.0, adam_eps=1e-2)
    engine = Engine(
        ModelConfig(hf_path=str(model_dir), dtype="float32"),
        parallel, optim, platform, total_steps=4, temperature=TEMPERATURE,
    )  # fmt: skip
    engine.load_hf(model_dir)
    anchor = Anchor(engine, AnchorConfig(decay=0.75))
    anchor_dir = Path(sys.argv[4])
    from megatron_t1.weights import hf_io

    hf_io.load(engine.pieces(anchor.module), anchor_dir)

    sequences = make_sequences(vocab_size=engine.spec.vocab_size)
    num_targets = sum(len(s.response_ids) for s in sequences)
    microbatches = engine.pack(sequences)
    anchor.fill(microbatches, len(sequences))
    results = {}
    loss = partial(t1_token_loss, cfg=LossConfig(entropy_coef=0.02, kl_coef=0.05))
    for name, token_loss in (("sft", sft_token_loss), ("rl", loss)):
        metrics = engine.step(microbatches, num_targets, token_loss)
        results[name] = metrics
        if not parallel.distributed_optimizer:  # else a rank's gradient buffer holds its own shard only
            tensors = dict(Plan(gradient_pieces(engine)).gather())
            if dist.get_rank() == 0:
                save_file(tensors, out / f"{name}.safetensors")
        if name == "sft":
            engine.load_hf(model_dir)
    tensors = dict(Plan(engine.pieces()).gather())
    anchor.update()
    averages = dict(Plan(engine.pieces(anchor.module)).gather())
    if dist.get_rank() == 0:
        save_file(tensors, out / "weights.safetensors")
        save_file(averages, out / "anchor.safetensors")
        (out / "metrics.json").write_text(json.dumps({**results, "num_microbatches": len(microbatches)}))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
