"""`t1 check --suggest`: the smallest layout whose estimate fits the given machines and the longest sequence."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace

from megatron_t1.check import estimate
from megatron_t1.check.machines import Machines, fullest, layout_of
from megatron_t1.config import Config
from megatron_t1.engine.layout import check_divisible, check_world
from megatron_t1.models.sizes import Sizes
from megatron_t1.models.spec import ModelSpec

SHARE = 0.95
"""Of a GPU's memory, what an estimate may take."""
_TENSORS = (1, 2, 4, 8)
_CONTEXTS = (1, 2, 4, 8, 16)
_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_ROUND = 512
"""Tokens that a microbatch is a multiple of."""


def suggest(
    cfg: Config, spec: ModelSpec, command: str, machines: Machines, longest: dict[str, int]
) -> tuple[Config, float] | None:
    """The config with other parallel.tensor, context, pipeline, sequence_parallel, max_tokens_per_microbatch and
    recomputation, and the bytes of its fullest GPU; None when nothing fits.

    The fewest GPUs for one copy of the model; of those without recomputation where that fits, then with the fewest
    pipeline stages, context-parallel ranks. One microbatch holds the longest sequence.

    Args:
        longest: tokens of the longest prompt of `train`, and of the longest example of `sft`.
    """
    sft = longest.get("sft", cfg.parallel.max_tokens_per_microbatch * cfg.parallel.context if command == "sft" else 0)
    rl = longest.get("train", 0) + cfg.sampling.max_new_tokens
    num_tokens = {"sft": sft, "rl": rl, "run": max(sft, rl)}[command]
    sizes, memory = Sizes.of(spec), SHARE * machines.accelerator.memory_bytes
    for candidate in _candidates(cfg, spec, machines.ranks(command), machines.ranks_on_node(command), num_tokens):
        layout = layout_of(candidate, spec, command, machines, longest)
        worst = max(sum(fullest(sizes, layout).values()), estimate.most_of_checkpoint(sizes, layout)[0])
        if worst < memory:
            return candidate, worst
    return None


def _candidates(cfg: Config, spec: ModelSpec, world: int, on_node: int, num_tokens: int) -> Iterator[Config]:
    """Layouts that the machines and the model allow: those whose tensor parallelism stays within a node, then the
    others; the smallest first."""
    stages = range(1, spec.transformer["num_layers"] + 1)
    shapes = [
        (tensor > on_node, tensor * context * pipeline, recomputes, pipeline, context, tensor)
        for tensor, context, pipeline, recomputes in itertools.product(_TENSORS, _CONTEXTS, stages, (False, True))
        if world % (tensor * context * pipeline) == 0
    ]
    for *_, recomputes, pipeline, context, tensor in sorted(shapes):
        given = {name: value for name, value in cfg.model.transformer.items() if not name.startswith("recompute_")}
        parallel = replace(
            cfg.parallel,
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            virtual_pipeline=1,
            pipeline_layers=(),
            sequence_parallel=tensor > 1,
            max_tokens_per_microbatch=-(-num_tokens // (context * _ROUND)) * _ROUND,
        )
        try:
            check_divisible(spec, parallel, given)
            check_world(parallel, world)
        except ValueError:
            continue
        model = replace(cfg.model, transformer=given | (_RECOMPUTE if recomputes else {}))
        yield replace(cfg, model=model, parallel=parallel)


def as_options(cfg: Config, worst: float) -> str:
    """As options of the command line, on a line of their own."""
    names = (
        "tensor", "context", "pipeline", "virtual_pipeline", "pipeline_layers", "sequence_parallel",
        "max_tokens_per_microbatch",
    )  # fmt: skip
    settings = {f"parallel.{name}": getattr(cfg.parallel, name) for name in names}
    settings["model.transformer"] = cfg.model.transformer
    options = shlex.join(word for name, value in settings.items() for word in (f"--{name}", json.dumps(value)))
    return f"the smallest layout that fits ({worst / 1e9:.0f} GB on the fullest GPU):\n{options}"
