"""RL by turns on one GPU, as examples/shared_gpus.yaml has it: what is taken of the GPU in whose turn, held to the plan
of `t1 check`; a step by stage; and whether anything is left behind from step to step. About four minutes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.commands import ROOT, metrics_of, quickstart, t1
from benchmarks.gpu.results import Check
from megatron_t1.check import estimate
from megatron_t1.check.machines import Machines, fullest, layout_of
from megatron_t1.cli.options import read
from megatron_t1.config import Config
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes
from megatron_t1.platform import te
from tests.tiny import make_tiny

MODEL = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
    "num_hidden_layers": 16,
}  # fmt: skip
"""0.7e9 parameters: 17 GB of them, gradients, optimizer and anchor, which do not fit beside the server."""
BATCH = {"rl.prompts_per_step": 18, "sampling.num_samples": 8, "sampling.max_new_tokens": 64, "rl.optim.lr": 1e-6}
"""Two microbatches, which are nearly full."""
STAGES = ("seconds/generate", "seconds/turns", "seconds/anchor", "seconds/train", "push_seconds")
TOLERANCE = 0.1
"""Of the plan."""
WARM_UP = 3
"""Steps after which nothing new is allocated: the optimizer has its moments, kernels are compiled."""
LEAK_GIB = 0.25


def turns(check: Check) -> None:
    steps = 3 if check.smoke else 20
    base, options = quickstart(check)
    dtype = "float32" if check.smoke else "bfloat16"
    model = make_tiny("Qwen2ForCausalLM", base / "hf", dtype=dtype, init_std=0.02, **({} if check.smoke else MODEL))
    options += ["--config", ROOT / "examples" / "shared_gpus.yaml", "--model.hf_path", model]
    options += [word for name, value in BATCH.items() for word in (f"--{name}", value)]
    options += ["--rl.steps", steps, "--rl.checkpoint.every_steps", steps]
    if shutil.disk_usage("/dev/shm").free < 3e9:  # twice the weights: a container's may be small
        options += ["--rollout.transport", "tcp"]
    with _memory() as samples:
        rc, _ = t1("rl", *options, timeout_s=1500 if check.smoke else 400)
    log = base / "run" / "logs" / "server_0.log"
    said = log.read_text() if log.exists() else ""
    print(said[-6000:])
    rows = metrics_of(base / "run")
    differences = [row["logprob_diff"] for row in rows]
    check.report(
        "t1 rl",
        rc == 0 and len(rows) == steps and all(difference < 0.05 for difference in differences),
        exit_code=rc,
        steps=len(rows),
        logprob_diff=differences[:1] + differences[-1:],
        seconds_of_a_step={
            stage: round(statistics.median(row[stage] for row in rows[WARM_UP - 1 :]), 3)
            for stage in STAGES
            if len(rows) >= WARM_UP
        },
    )
    if check.smoke:
        return
    # What vLLM finds taken of the whole GPU just after it fell asleep, before the trainer takes anything back.
    asleep = [float(gib) for gib in re.findall(r"Sleep mode freed \S+ GiB memory, (\S+) GiB memory is", said)]
    left = asleep[WARM_UP + 1 :]  # the first ones are of before the first step
    check.report(
        "nothing is left behind",
        len(left) >= steps - WARM_UP - 1 and max(left) - left[0] < LEAK_GIB,
        gib_taken_when_asleep=asleep,
    )
    with check.case("memory"):
        _hold_to_plan(check, options, samples, base / "run", asleep[:1])
    for large in (base / "run/rl/checkpoints", base / "run/rl/hf"):
        shutil.rmtree(large, ignore_errors=True)


def _hold_to_plan(
    check: Check, options: Sequence[object], samples: list[tuple[float, int, int]], run: Path, first: list[float]
) -> None:
    assert samples, "nvidia-smi said nothing"
    cfg = read(Config, [str(word) for word in options])
    spec = spec_of(Path(cfg.model.hf_path))
    layout = layout_of(cfg, spec, "rl", Machines(gpus_per_node=1, share_gpus=True), {"train": 50})
    parts = fullest(Sizes.of(spec), replace(layout, local_layers=te.version() is None))
    total = samples[0][2]
    server = cfg.rollout.gpu_memory_utilization * total
    planned = {
        "trainer": sum(parts.values()) + estimate.CONTEXT_BYTES + estimate.ASLEEP_BYTES,
        "servers": server + estimate.kept_bytes(parts, cfg.parallel.offload) + estimate.CONTEXT_BYTES,
    }
    spans = _spans(run)
    measured = {"trainer": _most(samples, spans, "anchor", "train"), "servers": _most(samples, spans, "generate")}
    ratios = {turn: measured[turn] / planned[turn] for turn in planned}
    check.report(
        "memory",
        all(abs(ratio - 1) < TOLERANCE for ratio in ratios.values()),
        measured_to_plan={turn: round(ratio, 3) for turn, ratio in ratios.items()},
        measured_gb={turn: round(value / 1e9, 2) for turn, value in measured.items()},
        planned_gb={name: round(value / 1e9, 2) for name, value in {**planned, **parts}.items()},
        planned_for_contexts_and_sleep_gb=(estimate.CONTEXT_BYTES + estimate.ASLEEP_BYTES) / 1e9,
        found_for_contexts_and_sleep_gb=[round(gib * 2**30 / 1e9, 2) for gib in first],
        gpu_gb=round(total / 1e9, 2),
    )


def _spans(run: Path) -> list[dict[str, Any]]:
    """Of the run's trace, which is a list that nobody closed."""
    events = json.loads((run / "rl" / "trace.json").read_text().rstrip().rstrip(",") + "]")
    return [event for event in events if event["ph"] == "X"]


def _most(samples: list[tuple[float, int, int]], spans: list[dict[str, Any]], *stages: str) -> int:
    """Bytes taken at most while these stages ran."""
    within = [
        taken
        for span in spans
        if span["name"] in stages
        for at, taken, _ in samples
        if span["ts"] <= 1e6 * at <= span["ts"] + span["dur"]
    ]
    assert within, f"no sample was taken in {stages}"
    return max(within)


@contextlib.contextmanager
def _memory() -> Iterator[list[tuple[float, int, int]]]:
    """(time.time(), bytes of the GPU that are taken, bytes that it has), some ten times a second."""
    samples: list[tuple[float, int, int]] = []
    over = threading.Event()
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]

    def look() -> None:
        while shutil.which("nvidia-smi") and not over.wait(0.05):
            said = subprocess.run(query, capture_output=True, text=True).stdout
            used, total = (int(word) << 20 for word in said.split(","))
            samples.append((time.time(), used, total))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
