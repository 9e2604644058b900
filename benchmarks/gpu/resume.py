"""Two runs of four steps, and one that stops after two and resumes: weights and anchor equal to the last bit."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import Check, relative
from benchmarks.gpu.trainer import engine_of, num_targets, start
from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.loss import t1_token_loss
from megatron_t1.engine import checkpoint, saving
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.config import AnchorConfig, CheckpointConfig
from megatron_t1.engine.prescore import prescore
from megatron_t1.engine.step import Engine
from tests.engine.batch import make_sequences
from tests.tiny import make_tiny

VARIANTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bf16": ("Qwen2ForCausalLM", "bfloat16", "auto", {}),
    "bf16 local": ("Qwen2ForCausalLM", "bfloat16", "local", {}),
    "fp32": ("Qwen2ForCausalLM", "float32", "auto", {}),
    "fp8": ("Qwen2ForCausalLM", "bfloat16", "auto", {"fp8": "hybrid"}),
    "moe": ("Qwen3MoeForCausalLM", "bfloat16", "auto", {}),
    "moe, four experts a token": ("Glm4MoeForCausalLM", "bfloat16", "auto", {}),
}
"""Architecture, precision, layers, fields of model.transformer"""
SIZES = {
    "Qwen2ForCausalLM": {"hidden_size": 256, "intermediate_size": 512},
    "Glm4MoeForCausalLM": {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
}


def resume(check: Check) -> None:
    platform = start()

    def build(folder: Path, dtype: str, layers: str, fields: dict[str, Any]) -> tuple[Engine, Anchor]:
        engine = engine_of(
            platform, folder, dtype=dtype, layers=layers, lr=1e-3, temperature=1.2, transformer=fields
        )  # fmt: skip
        return engine, Anchor(engine, AnchorConfig(decay=0.9))

    written: dict[str, tuple[Path, Path]] = {}
    for name, (architecture, dtype, layers, fields) in VARIANTS.items():
        if check.smoke and name not in ("bf16 local", "fp32"):
            continue
        with check.case(name):
            sizes = SIZES.get(architecture, {})
            base = check.work / name.replace(" ", "_")
            shutil.rmtree(base, ignore_errors=True)
            folder = make_tiny(architecture, base / "hf", vocab_size=321, init_std=0.1, dtype=dtype, **sizes)
            runs = []
            for _ in range(2):
                engine, anchor = build(folder, dtype, layers, fields)
                _advance(engine, anchor, 2)
                path = saving.begin(base / "ck", 2, engine, anchor, {}, CheckpointConfig(), score=0.0).finish()
                _advance(engine, anchor, 2)
                runs.append(_state(engine, anchor))
            engine, anchor = build(folder, dtype, layers, fields)
            checkpoint.load(path, engine, anchor)
            _advance(engine, anchor, 2)
            resumed = _state(engine, anchor)
            written[name] = folder, path
            again, back = _differences(*runs), _differences(runs[0], resumed)
            check.report(
                name, not again and not back, tensors=len(resumed), two_runs_differ=again, resumed_differs=back
            )
    for name, layers in (("bf16", "local"), ("bf16 local", "auto")):
        if not {"bf16", "bf16 local"} <= written.keys():
            continue
        case = f"{name} as {layers}"
        with check.case(case):
            folder, path = written[name]
            engine, anchor = build(folder, "bfloat16", layers, {})
            try:
                checkpoint.load(path, engine, anchor)
            except ValueError as error:  # Transformer Engine's layers keep what the local ones don't have
                check.report(case, layers == "auto" and "_extra_state" in str(error), refused=str(error)[:120])
            else:
                check.report(case, True, grad_norm=_advance(engine, anchor, 1)["grad_norm"])


def _advance(engine: Engine, anchor: Anchor, steps: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for _ in range(steps):
        sequences = make_sequences(321)
        microbatches = engine.pack(sequences)
        cfg = LossConfig(entropy_coef=0.01, kl_coef=0.02)
        prescore(engine, anchor, microbatches, sequences, cfg)
        metrics = engine.step(microbatches, num_targets(sequences), partial(t1_token_loss, cfg=cfg))
        anchor.update()
    return metrics


def _state(engine: Engine, anchor: Anchor) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().float().cpu().clone() for c in engine.chunks for name, p in c.named_parameters()}
    return weights | {f"anchor {i}": a.detach().float().cpu().clone() for i, a in enumerate(anchor.average)}


def _differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative(one[name], other[name]) for name in one if not torch.equal(one[name], other[name])}
