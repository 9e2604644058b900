"""A step whose gradient is not finite leaves weights, moments and the steps after it as if it had not been.

argv: model folder, layout as JSON, clip_grad, dtype.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_t1.algo.loss import sft_token_loss
from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.parallel import initialize
from megatron_t1.engine.step import Engine
from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences


def broken_loss(logprob: torch.Tensor, entropy: torch.Tensor, tokens: object) -> object:
    """Finite, and its derivative is not."""
    loss, metrics = sft_token_loss(logprob, entropy, tokens)
    return loss + (logprob - logprob.detach()).sqrt(), metrics


def infinite_loss(logprob: torch.Tensor, entropy: torch.Tensor, tokens: object) -> object:
    loss, metrics = sft_token_loss(logprob, entropy, tokens)
    return loss * float("inf"), metrics


def main() -> None:
    model_dir, parallel = Path(sys.argv[1]), ParallelConfig(**json.loads(sys.argv[2]))
    platform = setup()
    initialize(parallel, platform, 0)
    optim = OptimConfig(lr=1e-3, schedule="constant", clip_grad=float(sys.argv[3]))
    model = ModelConfig(hf_path=str(model_dir), dtype=sys.argv[4])
    engine, spared = (Engine(model, parallel, optim, platform, total_steps=10, temperature=1.0) for _ in range(2))
    sequences = make_sequences(engine.spec.vocab_size)
    num_targets = sum(len(s.response_ids) for s in sequences)

    def step(engine: Engine, loss: object = sft_token_loss) -> dict[str, float]:
        return engine.step(engine.pack(sequences), num_targets, loss)

    for each in (engine, spared):
        each.load_weights(model_dir)
        step(each)  # Adam's moments are not 0
    for _ in range(2):
        for loss in (broken_loss, infinite_loss):
            metrics = step(engine, loss)
            assert metrics["skipped"] == 1
            assert "grad_norm" not in metrics
        assert step(engine) == step(spared)
    for one, other in zip(engine.tensors(), spared.tensors(), strict=True):
        assert torch.equal(one, other)

    for _ in range(2):
        step(engine, broken_loss)
    with pytest.raises(FloatingPointError, match="in 3 steps one after another"):
        step(engine, broken_loss)
    for one, other in zip(engine.tensors(), spared.tensors(), strict=True):
        assert torch.equal(one, other)


if __name__ == "__main__":
    main()
