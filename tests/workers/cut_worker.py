"""Cuts passes off by a signal to rank 0, and trains the step after all: no difference to one that nothing disturbed.

argv: model folder, layout as JSON, microbatches after whose beginning the signal comes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_t1.algo.loss import sft_token_loss
from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.model import T1GPTModel
from megatron_t1.engine.parallel import initialize
from megatron_t1.engine.step import Engine
from megatron_t1.platform.detect import setup
from megatron_t1.stop import STOP, Stopped
from tests.engine.batch import make_sequences


def main() -> None:
    model_dir, parallel, after = Path(sys.argv[1]), ParallelConfig(**json.loads(sys.argv[2])), int(sys.argv[3])
    platform = setup()
    initialize(parallel, platform, 0)
    STOP.install()
    computed: list[None] = []
    forward = T1GPTModel.forward

    def counted(*args, **kwargs):
        computed.append(None)
        if dist.get_rank() == 0 and len(computed) == after * parallel.virtual_pipeline:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(*args, **kwargs)

    engines = [
        Engine(
            ModelConfig(hf_path=str(model_dir), dtype="float32"),
            parallel, OptimConfig(lr=1e-3), platform, total_steps=10, temperature=1.0,
        )
        for _ in range(2)
    ]  # fmt: skip
    sequences = 3 * make_sequences(engines[0].spec.vocab_size)
    num_targets = sum(len(s.response_ids) for s in sequences)

    def step(engine: Engine) -> dict[str, float]:
        return engine.step(engine.pack(sequences), num_targets, sft_token_loss)

    for engine in engines:
        engine.load_weights(model_dir)
        step(engine)  # Adam's moments are not 0
    undisturbed = step(engines[0])

    num = len(engines[1].pack(sequences)) * parallel.virtual_pipeline
    T1GPTModel.forward = counted
    for cut_off in (lambda: step(engines[1]), lambda: engines[1].logprobs(sequences)):
        computed.clear()
        try:
            cut_off()
        except Stopped:
            pass
        else:
            raise AssertionError("it was not cut off")
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, len(computed))
        assert len(set(everyone)) == 1, f"passes of the ranks: {everyone}"
        assert after <= everyone[0] < num, f"{everyone[0]} of {num} passes"
        STOP.asked = False
    T1GPTModel.forward = forward

    assert step(engines[1]) == undisturbed
    for one, other in zip(*(engine.tensors() for engine in engines), strict=True):
        assert torch.equal(one, other)


if __name__ == "__main__":
    main()
