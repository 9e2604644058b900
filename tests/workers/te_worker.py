"""Every family with Transformer Engine's layers (the stand-in's) and with the local ones, on one layout: loss, gradient
norm, logprobs before and after a step, and a checkpoint of the one loaded into the other. Rank 0 writes the largest
differences.

argv: folder of the checkpoints, folder for the results, {layout: [ParallelConfig fields, {family: whether it saves and
loads a checkpoint}]} as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_t1.platform.detect import setup
from tests.engine.batch import make_sequences

TE_VERSION = "2.11.0"


def main() -> None:
    checkpoints, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    platform = replace(setup(), transformer_engine=TE_VERSION)
    from megatron.core import parallel_state as mpu
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine import checkpoint, model, saving, step
    from megatron_t1.engine.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize

    assert HAVE_TE, "the stand-in is not on PYTHONPATH"
    # In float32 Transformer Engine multiplies in TF32, so its layers are not taken there; the stand-in's are exact.
    model.takes_te_layers = step.takes_te_layers = lambda cfg, _: cfg.layers == "auto"

    for layout, (fields, families) in layouts.items():
        parallel = ParallelConfig(**{"max_tokens_per_microbatch": 120, **fields})
        initialize(parallel, platform, 0)
        for family, checkpoints_too in families.items():
            folder, result = checkpoints / family, out / layout / family

            def build(layers: str, folder: Path = folder, parallel: ParallelConfig = parallel) -> step.Engine:
                return step.Engine(
                    ModelConfig(hf_path=str(folder), dtype="float32", layers=layers), parallel,
                    OptimConfig(lr=1e-2, clip_grad=0.05, adam_eps=1e-2), platform, total_steps=2, temperature=1.0,
                )  # fmt: skip

            found: dict[str, Any] = {}
            for layers in ("local", "auto"):
                engine = build(layers)
                engine.load_weights(folder)
                sequences = make_sequences(engine.spec.vocab_size)
                classes = [cls for module in engine.chunks[-1].modules() for cls in type(module).__mro__]
                built_of_te = any(cls.__module__.startswith("transformer_engine") for cls in classes)
                before = engine.logprobs(sequences)
                num_targets = sum(len(s.response_ids) for s in sequences)
                metrics = engine.step(engine.pack(sequences), num_targets, sft_token_loss)
                found[layers] = (metrics, before, engine.logprobs(sequences), built_of_te)
            if checkpoints_too:
                path = saving.begin(result, 1, engine, None, {}, CheckpointConfig(), score=0.0).finish()
                resumed = build("local")
                checkpoint.load(path, resumed, None)
                found["loaded"] = resumed.logprobs(sequences)
            if dist.get_rank() == 0:
                result.mkdir(parents=True, exist_ok=True)
                (result / "results.json").write_text(json.dumps(differences(found)))
        mpu.destroy_model_parallel()


def differences(found: dict[str, Any]) -> dict[str, Any]:
    local, te = found["local"], found["auto"]
    return {
        "built of": [local[3], te[3]],
        **{name: [local[0][name], te[0][name]] for name in ("loss", "grad_norm")},
        "logprobs before": worst(local[1], te[1]),
        "logprobs after": worst(local[2], te[2]),
        "moved": worst(te[1], te[2]),
        "loaded into local layers": worst(te[2], found.get("loaded", te[2])),
    }


def worst(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
