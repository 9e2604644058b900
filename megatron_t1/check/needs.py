"""What a run needs of its machines, held against what they have: memory by part, disk, servers, time by stage.

    the trainer's memory -> what a shared GPU leaves to servers -> stopping -> disk -> servers -> a step

The formulas are in estimate.py; here are the bounds, and what to change where one is passed.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil

from megatron_t1.check import estimate
from megatron_t1.check.findings import Findings
from megatron_t1.check.machines import Machines, fullest, kv_copies, layout_of, nodes_that_write, seconds_of
from megatron_t1.check.suggest import SHARE
from megatron_t1.config import UNCORRECTED, Config
from megatron_t1.engine.config import CheckpointConfig
from megatron_t1.models.sizes import Sizes
from megatron_t1.models.spec import ModelSpec

_SHARED = 0.97
"""Of a GPU's memory, what is planned for where trainer and servers share it."""
SCRIPTS_GRACE_S = 1740.0
"""GRACE_S in slurm/lib.sh."""
_TURNS = {
    ("none", False): "as it is",
    ("none", True): "rollout.sleep = true",
    ("optimizer", True): "parallel.offload = optimizer and rollout.sleep = true",
    ("all", True): "parallel.offload = all and rollout.sleep = true",
}
"""(parallel.offload, rollout.sleep) in the order in which they are offered."""


def needs(
    cfg: Config, spec: ModelSpec, command: str, machines: Machines, longest: dict[str, int], found: Findings
) -> None:
    """Adds what `t1 <command>` needs, and what the machines lack of it.

    Args:
        command: sft, rl or run.
        longest: tokens of the longest prompt of `train`, and of the longest example of `sft`.
    """
    sizes, gpu = Sizes.of(spec), machines.accelerator
    layout = layout_of(cfg, spec, command, machines, longest)
    seconds = seconds_of(cfg, spec, command, machines, longest)
    checkpoint = estimate.checkpoint_bytes(sizes, cfg.model.dtype, layout.anchor)
    samples = command != "sft"
    host = {"checkpoint": _memory(command, machines, sizes, layout, gpu, found)}
    if samples and machines.share_gpus:
        host |= _shared(cfg, spec, machines, sizes, layout, gpu, found)
    _host(host, found)
    awaits_batch = samples and cfg.awaits_batches
    nodes = nodes_that_write(layout, max(1, machines.ranks_on_node(command)))
    stopping = estimate.stop_seconds(sizes, layout, seconds, checkpoint, nodes, awaits_batch=awaits_batch)
    _grace(stopping, machines, found)
    _disk(cfg, command, sizes, layout.anchor, found)
    if samples:
        found.should(not cfg.trains_uncorrected, UNCORRECTED)
        _servers(cfg, spec, sizes, gpu, seconds["generate"], found)
    step_s = sum(seconds.values())
    if samples and cfg.rl.lag:
        step_s = max(seconds["generate"], step_s - seconds["generate"])
    lengths = ", if responses have half of max_new_tokens on average" if samples else ""
    found.facts.append(f"time of a step: about {_rounded(step_s)} s ({_listed(seconds)}) on {machines.gpu}s{lengths}")


def _host(parts: Mapping[str, float], found: Findings) -> None:
    """Bytes of a node's memory by part, all at one time when a checkpoint is written while a push arrives."""
    total, listed = sum(parts.values()), ", ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items())
    found.facts.append(f"memory of a node: {total / 1e9:.3g} GB ({listed}), besides what the processes themselves take")
    here = psutil.virtual_memory().total
    found.should(
        total < SHARE * here or "SLURM_JOB_ID" not in os.environ,  # elsewhere this machine is none of the run's
        f"trainer, checkpoint and push take {total / 1e9:.0f} GB of a node's memory, this one has {here / 1e9:.0f}: "
        "more nodes or parallel.pipeline, or parallel.offload = none",
    )


def _memory(
    command: str, machines: Machines, sizes: Sizes, layout: estimate.Layout, gpu: estimate.Gpu, found: Findings
) -> float:
    """Adds what is needed of a GPU; returns the bytes of a node's memory that a checkpoint takes."""
    worst = fullest(sizes, layout)
    total = sum(worst.values())
    listed = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in worst.items() if value)
    found.facts.append(
        f"memory of the fullest trainer GPU: {total / 1e9:.3g} GB ({listed}); TP {layout.tensor}, "
        f"CP {layout.context}, PP {layout.pipeline}, DP {layout.data}, {layout.tokens} tokens of a microbatch on a rank"
    )
    found.should(
        total < SHARE * gpu.memory_bytes,
        f"the trainer needs about {total / 1e9:.0f} GB on a GPU of {gpu.memory_bytes / 1e9:.0f} GB: more nodes, more "
        "parallel.pipeline, fewer parallel.max_tokens_per_microbatch (more parallel.context) or full recomputation",
    )
    gpu_bytes, host_bytes = estimate.most_of_checkpoint(sizes, layout)
    found.facts.append(f"a checkpoint takes {gpu_bytes / 1e9:.3g} GB of a trainer GPU while it is gathered")
    found.should(
        gpu_bytes < SHARE * gpu.memory_bytes,
        f"a checkpoint gathers the optimizer's state: about {gpu_bytes / 1e9:.0f} GB on a GPU of "
        f"{gpu.memory_bytes / 1e9:.0f} GB; more parallel.pipeline or parallel.tensor",
    )
    return machines.ranks_on_node(command) * host_bytes


def _disk(cfg: Config, command: str, sizes: Sizes, anchor: estimate.AnchorKind, found: Findings) -> None:
    stages = [stage for stage in ("sft", "rl") if command in (stage, "run")]
    count, disk = 0, 0.0
    for stage in stages:
        keeps: CheckpointConfig = getattr(cfg, stage).checkpoint
        kept = keeps.keep + keeps.keep_best + 1  # and the one that is being written
        count += kept
        disk += kept * estimate.checkpoint_bytes(sizes, cfg.model.dtype, anchor if stage == "rl" else "none")
    what = f"{count} checkpoints"
    if command != "sft" and cfg.rl.snapshot_every and (snapshots := cfg.rl.steps // cfg.rl.snapshot_every):
        disk += snapshots * estimate.weight_bytes(sizes, cfg.model.dtype)
        what += f" and {snapshots} snapshots"
    folder = next(
        path for path in (Path(cfg.run_dir).absolute(), *Path(cfg.run_dir).absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(folder).free
    files = (
        file
        for stage, kind in itertools.product(stages, ("checkpoints", "snapshots"))
        for file in Path(cfg.run_dir, stage).glob(f"{kind}/**/*")
    )
    there = sum(file.stat().st_size for file in files if file.is_file())
    found.facts.append(
        f"disk: {what} take {disk / 1e9:.2f} GB{f', {there / 1e9:.2f} are there' if there else ''}, {folder} has "
        f"{free / 1e9:.0f} GB free"
    )
    found.must(
        disk - there <= free,
        f"{what} take {disk / 1e9:.1f} GB, {there / 1e9:.1f} are there, and {folder} has {free / 1e9:.1f} GB free: "
        f"make room, or lower {stages[-1]}.checkpoint.keep = {keeps.keep} or keep_best = {keeps.keep_best}",
    )


def _servers(cfg: Config, spec: ModelSpec, sizes: Sizes, gpu: estimate.Gpu, generate_s: float, found: Findings) -> None:
    rollout = cfg.rollout
    holds = estimate.cache_tokens(
        sizes, gpu, rollout.tp, cfg.server_dtype, rollout.gpu_memory_utilization, kv_copies(spec, rollout.tp)
    )
    full = cfg.rollout.max_model_len or spec.max_position_embeddings
    found.facts.append(
        f"each vLLM server (TP {cfg.rollout.tp}): room for {holds:.0f} tokens of keys and values, {holds / full:.1f} "
        f"samples of {full} tokens at a time"
    )
    found.should(
        holds >= full,
        f"a vLLM server of TP {cfg.rollout.tp} has no room for one sample of {full} tokens: raise rollout.tp",
    )
    for name, limit_s in (
        ("rollout.request_timeout_s", cfg.rollout.request_timeout_s),
        ("parallel.timeout_s", cfg.parallel.timeout_s),
    ):
        found.should(
            2 * generate_s <= limit_s,
            f"{name} = {limit_s:.0f} is not well above the {generate_s:.0f} s that generating a batch may take: "
            "raise it",
        )


def _shared(
    cfg: Config,
    spec: ModelSpec,
    machines: Machines,
    sizes: Sizes,
    layout: estimate.Layout,
    gpu: estimate.Gpu,
    found: Findings,
) -> dict[str, float]:
    """Trainer and server on one GPU: what each takes of it in whose turn. Returns bytes of a node's memory by part."""
    parts, asked, total = fullest(sizes, layout), cfg.rollout.gpu_memory_utilization, _SHARED * gpu.memory_bytes
    step, saving = sum(parts.values()), estimate.most_of_checkpoint(sizes, layout)[0]
    dtype, tp = cfg.server_dtype, cfg.rollout.tp
    length = cfg.rollout.max_model_len or spec.max_position_embeddings
    offload, sleep = cfg.parallel.offload, cfg.rollout.sleep
    offered = {turns: name for turns, name in _TURNS.items() if not (turns[1] and cfg.rl.lag)}
    rooms, told = {}, []
    for turns in _TURNS:
        kept = estimate.kept_bytes(parts, turns[0]) if turns[1] else max(step, saving)
        free = (total - kept - estimate.CONTEXT_BYTES) / gpu.memory_bytes
        rooms[turns] = room = max(0, math.floor(100 * free)) / 100
        samples = estimate.cache_tokens(sizes, gpu, tp, dtype, room, kv_copies(spec, tp)) / length
        cost = estimate.turn_seconds(estimate.moved_bytes(parts, layout, turns[0]), gpu, sleep=turns[1])
        if turns in offered:
            told.append(f"{offered[turns]}: {room:.2f} ({samples:.0f} samples, {cost:.1f} s a step)")
    found.facts.append(
        "what the trainer leaves of a shared GPU for rollout.gpu_memory_utilization, the samples of "
        f"{length} tokens that a server then holds, and what it costs; {'; '.join(told)}"
    )
    room = rooms[offload if sleep else "none", sleep]
    enough = next((name for turns, name in offered.items() if rooms[turns] >= asked), None)
    found.must(
        asked <= room,
        f"rollout.gpu_memory_utilization = {asked:g} is more than the {room:.2f} of a shared GPU that the trainer "
        f"leaves: lower it, {f'set {enough}, ' if enough else ''}or have the trainer need less (more nodes or "
        "parallel.pipeline, fewer parallel.max_tokens_per_microbatch, full recomputation)",
    )
    found.should(
        sleep or offload == "none",
        f"parallel.offload = {offload} gives the servers nothing while rollout.sleep is off: they take their memory "
        "once, at their start",
    )
    if sleep:
        # They load a push while the trainer begins its checkpoint.
        loading = saving + estimate.weight_bytes(sizes, dtype) / tp
        needed = max(step, loading) + estimate.CONTEXT_BYTES + estimate.ASLEEP_BYTES
        found.must(
            needed <= total,
            f"trainer and sleeping servers need {needed / 1e9:.0f} GB of a GPU of {gpu.memory_bytes / 1e9:.0f} GB: "
            "more nodes or parallel.pipeline, fewer parallel.max_tokens_per_microbatch, or full recomputation",
        )
    host = {"a push in /dev/shm": estimate.weight_bytes(sizes, cfg.model.dtype)}
    if offload != "none":
        host[f"parallel.offload = {offload}"] = machines.gpus_per_node * estimate.moved_bytes(parts, layout, offload)
    return host


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_rounded(value)} s" for name, value in seconds.items())


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _grace(seconds: Mapping[str, float], machines: Machines, found: Findings) -> None:
    """What stopping takes at worst, against what the batch script gives it."""
    needed = sum(seconds.values())
    found.facts.append(f"stopping needs about {needed:.0f} s from USR1, at worst ({_listed(seconds)})")
    given, enough = machines.grace_s or SCRIPTS_GRACE_S, 60 * math.ceil(needed / 60)
    hold = found.must if machines.grace_s else found.should
    hold(
        needed <= given,
        f"GRACE_S = {given:.0f}{'' if machines.grace_s else ', as the batch scripts have it,'} is less than stopping "
        "needs: the time limit would kill the trainer before its checkpoint is whole; submit with "
        f"GRACE_S={enough} and sbatch --signal=B:USR1@{enough + 60}",
    )
