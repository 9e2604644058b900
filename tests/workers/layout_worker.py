"""One SFT step and one RL step of each loss on a given layout; rank 0 writes losses, metrics, gradients and weights."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_t1.platform.detect import setup
from tests.engine.batch import COEFFICIENTS, LOSSES, TEMPERATURE, make_sequences
from tests.workers.gradients import gradient_pieces


def main() -> None:
    model_dir, out, layout = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    platform = setup()
    from megatron_t1.algo.config import LossConfig
    from megatron_t1.algo.loss import TokenFields, sft_token_loss, t1_token_loss
    from megatron_t1.engine.anchor import Anchor
    from megatron_t1.engine.config import AnchorConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.prescore import prescore
    from megatron_t1.engine.step import Engine
    from megatron_t1.weights import hf_io
    from megatron_t1.weights.plan import Plan

    parallel = ParallelConfig(**layout)
    initialize(parallel, platform, 0)
    optim = OptimConfig(lr=1e-3, clip_grad=0.0, adam_eps=1e-2)
    engine = Engine(
        ModelConfig(hf_path=str(model_dir), dtype="float32"),
        parallel, optim, platform, total_steps=10, temperature=TEMPERATURE,
    )  # fmt: skip
    anchor = Anchor(engine, AnchorConfig(decay=0.75))
    hf_io.load(engine.pieces(anchor.chunks), Path(sys.argv[4]))

    sequences = make_sequences(vocab_size=engine.spec.vocab_size)
    num_targets = sum(len(s.response_ids) for s in sequences)
    per_target = ("target_positions", "targets", "sample_index", *(f.name for f in fields(TokenFields)))
    results = {}

    def pack():
        microbatches = engine.pack(sequences)
        # One more whose tokens are all masked: it must change nothing.
        nothing = {name: getattr(microbatches[0], name)[:0] for name in per_target}
        return [*microbatches, replace(microbatches[0], **nothing)]

    def step(name, token_loss, cfg=None):
        engine.load_weights(model_dir)
        microbatches = pack()
        of_loss = anchor if cfg and cfg.kl_coef else None
        kl = prescore(engine, of_loss, microbatches, sequences, cfg) if cfg else {}
        results[name] = engine.step(microbatches, num_targets, token_loss, of_loss.chunks if of_loss else None) | kl
        if not parallel.distributed_optimizer:  # else a rank's gradient buffer holds its own shard only
            tensors = dict(Plan(gradient_pieces(engine)).gather())
            if dist.get_rank() == 0:
                save_file(tensors, out / f"{name}.safetensors")

    step("sft", sft_token_loss)
    for name, given in LOSSES.items():
        cfg = LossConfig(**COEFFICIENTS | given)
        step(name, partial(t1_token_loss, cfg=cfg), cfg)
    tensors = dict(Plan(engine.pieces()).gather())
    anchor.update()
    averages = dict(Plan(engine.pieces(anchor.chunks)).gather())
    anchor.reset()
    results["anchor is policy"] = prescore(engine, anchor, pack(), sequences, LossConfig())
    results["balance"] = engine.balance(engine.pack(sequences), sequences)
    if dist.get_rank() == 0:
        save_file(tensors, out / "weights.safetensors")
        save_file(averages, out / "anchor.safetensors")
        (out / "metrics.json").write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
