"""One training step at the width of Qwen2.5-32B: by phase, in bfloat16 and FP8, and its memory against the estimate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu.results import Check, free_memory, peak_bytes, synchronize
from benchmarks.gpu.trainer import QWEN_32B, TINY, engine_of, num_targets, qwen2_folder, random_sequences, start
from megatron_t1.algo.config import CHUNK_LOGITS, LossConfig
from megatron_t1.algo.loss import t1_token_loss
from megatron_t1.check.estimate import Layout, stage_memory
from megatron_t1.engine import step as engine_step
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.config import AnchorConfig
from megatron_t1.engine.prescore import prescore
from megatron_t1.engine.step import Engine
from megatron_t1.models.sizes import Sizes

RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 tensorwise": {"fp8": "hybrid"},
    "fp8 blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}


def step(check: Check) -> None:
    """Two layers, the whole vocabulary, 8,192 tokens in one microbatch."""
    platform = start()
    sizes = {**(TINY if check.smoke else QWEN_32B), "layers": 2, "vocab": 512 if check.smoke else 152064}
    num_tokens, length = (128, 64) if check.smoke else (8192, 1024)
    folder = qwen2_folder(check.work / "hf", **sizes)
    sequences = random_sequences(sizes["vocab"], num_tokens, length)
    loss = partial(t1_token_loss, cfg=LossConfig(entropy_coef=1e-3, kl_coef=0.0))
    first: dict[str, Any] = {}
    for name, fields in RECIPES.items():
        if check.smoke and fields:
            continue
        with check.case(name):
            free_memory()
            engine = engine_of(platform, folder, max_tokens=num_tokens, lr=1e-5, transformer=fields, load=False)
            logprobs = np.concatenate(engine.logprobs(sequences[:2]))
            microbatches = engine.pack(sequences)
            rows = [engine.step(microbatches, num_targets(sequences), loss) for _ in range(2)]
            peak = peak_bytes()
            phases = _Phases()
            with phases.timing(
                head=(engine_step, "fused_loss"),
                forward_and_backward=(engine, "_run"),
                optimizer=(engine.optimizer, "step"),
            ):
                for _ in range(4):
                    with phases.measure("step"):
                        rows.append(engine.step(microbatches, num_targets(sequences), loss))
            for _ in range(4):
                with phases.measure("layers_forward"):
                    engine.map_hidden(engine.chunks, microbatches, lambda hidden, head, microbatch: None)
            found = phases.medians()
            reference = first or {**found, "logprobs": logprobs}
            first = first or reference
            layer_flops, head_flops = _flops(engine, sum(s.num_tokens for s in sequences), num_targets(sequences))
            losses = [row["loss"] for row in rows]
            check.report(
                name,
                all(map(math.isfinite, losses)),
                milliseconds={phase: round(1e3 * seconds, 1) for phase, seconds in found.items()},
                speedup_to_bf16={
                    phase: round(reference[phase] / found[phase], 2) for phase in ("step", "layers_forward")
                },
                step_tflops=round((layer_flops + head_flops) / found["step"] / 1e12),
                layers_forward_tflops=round(layer_flops / 3 / found["layers_forward"] / 1e12),
                logprob_difference_to_bf16=float(np.abs(logprobs - reference["logprobs"]).mean()),
                losses=[round(value, 4) for value in losses],
                grad_norms=[round(row["grad_norm"], 4) for row in rows],
            )
            _compare_memory(check, f"memory, {name}", engine, num_tokens, len(microbatches), peak, with_anchor=False)
            del engine, microbatches


def memory(check: Check) -> None:
    """12 layers of 2,048, with anchor: what `t1 check` estimates against what the allocator saw at most."""
    _memory(check, "auto")


def memory_local(check: Check) -> None:
    _memory(check, "local")


def _memory(check: Check, layers: str) -> None:
    platform = start()
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
    sizes = {
        **(TINY if check.smoke else sizes),
        "layers": 2 if check.smoke else 12,
        "vocab": 512 if check.smoke else 65536,
    }
    num_tokens, length = (128, 64) if check.smoke else (8192, 512)
    with check.case(layers):
        folder = qwen2_folder(check.work / "hf", **sizes)
        engine = engine_of(platform, folder, layers=layers, max_tokens=num_tokens, lr=1e-5, temperature=1.2, load=False)
        anchor = Anchor(engine, AnchorConfig())
        sequences = random_sequences(sizes["vocab"], 2 * num_tokens, length)
        microbatches = engine.pack(sequences)
        phases = _Phases()
        for _ in range(3):
            with phases.measure("anchor"):
                prescore(engine, anchor, microbatches, sequences, LossConfig())
            with phases.measure("step"):
                engine.step(microbatches, num_targets(sequences), partial(t1_token_loss, cfg=LossConfig()))
            with phases.measure("average"):
                anchor.update()
        seconds = {phase: round(value, 4) for phase, value in phases.medians().items()}
        check.report("seconds", None, **seconds, tokens=sum(s.num_tokens for s in sequences))
        _compare_memory(check, "memory", engine, num_tokens, len(microbatches), peak_bytes(), with_anchor=True)


def _compare_memory(
    check: Check, case: str, engine: Engine, num_tokens: int, num_microbatches: int, peak: int, *, with_anchor: bool
) -> None:
    layout = Layout(
        tensor=1, pipeline=1, data=1, sequence_parallel=False, distributed_optimizer=True, recompute=False,
        dtype=engine.model_config.dtype, local_layers=engine.local_layers, tokens=num_tokens,
        microbatches=num_microbatches, chunk_logits=CHUNK_LOGITS[engine.platform.device.type],
        fp8=bool(engine.config.fp8), anchor="moving" if with_anchor else "none",
    )  # fmt: skip
    parts = stage_memory(Sizes.of(engine.spec), layout, 0)
    ratio = peak / sum(parts.values())
    check.report(
        case,
        check.smoke or 0.85 < ratio < 1.15,
        measured_gb=round(peak / 1e9, 2),
        measured_to_estimate=round(ratio, 3),
        estimate_gb={name: round(value / 1e9, 2) for name, value in parts.items()},
    )


def _flops(engine: Engine, num_tokens: int, num_targets: int) -> tuple[float, float]:
    """Of a step, forward and backward: the layers' and the head's."""
    sizes = Sizes.of(engine.spec)
    head = sizes.vocab * sizes.hidden
    return 6.0 * num_tokens * (sizes.active - head), 6.0 * num_targets * head


class _Phases:
    """Seconds of named phases, the device waited for at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def medians(self) -> dict[str, float]:
        return {name: float(np.median(values)) for name, values in self.seconds.items()}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        self.seconds[phase].append(time.perf_counter() - began)

    @contextmanager
    def timing(self, **functions: tuple[Any, str]) -> Iterator[None]:
        """While it is open, every call of `owner.name` is a phase of its own: phase=(owner, name)."""
        with ExitStack() as stack:
            for phase, (owner, name) in functions.items():
                timed = self.measure(phase)(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield
