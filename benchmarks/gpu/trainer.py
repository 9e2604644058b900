"""An engine of one rank, and what to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.parallel import initialize
from megatron_t1.engine.step import Engine
from megatron_t1.platform.detect import Platform, setup
from megatron_t1.types import TrainSequence

QWEN_32B = {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def start() -> Platform:
    platform = setup()
    initialize(ParallelConfig(), platform, 0)
    print(platform.describe(), flush=True)
    return platform


def engine_of(
    platform: Platform,
    folder: Path,
    *,
    dtype: Any = "bfloat16",
    layers: Any = "auto",
    max_tokens: int = 120,
    lr: float = 0.0,
    temperature: float = 1.0,
    transformer: dict[str, Any] | None = None,
    load: bool = True,
) -> Engine:
    """lr 0: gradients are looked at, whole and unclipped; else as in training."""
    engine = Engine(
        ModelConfig(hf_path=str(folder), dtype=dtype, layers=layers, transformer=transformer or {}),
        ParallelConfig(max_tokens_per_microbatch=max_tokens, distributed_optimizer=lr > 0),
        OptimConfig(lr=lr, clip_grad=1.0 if lr else 0.0),
        platform,
        total_steps=100,
        temperature=temperature,
    )
    if load:
        engine.load_weights(folder)
    else:
        _draw(engine)
    return engine


def qwen2_folder(folder: Path, *, layers: int, vocab: int, **sizes: int) -> Path:
    """A config alone: weights of this size are drawn on the device."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": layers, "vocab_size": vocab,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_sequences(vocab: int, num_tokens: int, length: int) -> list[TrainSequence]:
    """num_tokens in all, in sequences of about `length` with a prompt of 16: numbers of targets that nothing divides,
    as in training."""
    rng = np.random.default_rng(0)
    return [
        TrainSequence(
            prompt_ids=rng.integers(0, vocab, 16),
            response_ids=rng.integers(0, vocab, length - 16 - number % 3),
            advantage=float(rng.normal()),
        )
        for number in range(num_tokens // length)
    ]


def num_targets(sequences: list[TrainSequence]) -> int:
    return sum(len(sequence.response_ids) for sequence in sequences)


@torch.no_grad()
def _draw(engine: Engine) -> None:
    generator = torch.Generator(device=engine.platform.device).manual_seed(0)
    for name, param in engine.chunks[0].named_parameters():
        if param.ndim > 1:
            param.normal_(std=0.02, generator=generator)
        else:
            param.fill_(1.0 if "norm" in name else 0.0)
    engine.optimizer.reload_model_params()
