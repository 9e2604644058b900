"""kept_worker.py MODEL_DIR TOKENS: the bytes that a step's forward pass keeps for its backward, and their estimate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_t1.algo.loss import sft_token_loss
from megatron_t1.check.estimate import Layout, stage_memory
from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.parallel import initialize
from megatron_t1.engine.step import Engine
from megatron_t1.models.sizes import Sizes
from megatron_t1.platform.detect import setup
from megatron_t1.types import TrainSequence


def main(model_dir: Path, tokens: int) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform, parallel = setup(), ParallelConfig(max_tokens_per_microbatch=tokens)
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=str(model_dir), dtype="float32")
    engine = Engine(model, parallel, OptimConfig(lr=1e-3), platform, total_steps=1, temperature=1.0)
    engine.load_weights(model_dir)
    rng = np.random.default_rng(0)
    sequence = TrainSequence(
        prompt_ids=rng.integers(0, 99, 1), response_ids=rng.integers(0, 99, tokens - 1), advantage=1.0
    )
    weights = {param.untyped_storage().data_ptr() for chunk in engine.chunks for param in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}  # a tensor of each storage, which stays: no other takes its place

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.step(engine.pack([sequence]), tokens, lambda *given: sft_token_loss(*given))
    layout = Layout(
        tensor=1, pipeline=1, sequence_parallel=False, data=1, distributed_optimizer=True, dtype="float32",
        recompute=False, local_layers=True, tokens=tokens, microbatches=1, chunk_logits=1 << 40,
        experts_of_token=engine.spec.transformer.get("moe_router_topk") or 0,
    )  # fmt: skip
    estimate = stage_memory(Sizes.of(engine.spec), layout, 0)["activations"]
    print(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), round(estimate))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
