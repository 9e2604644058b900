"""The memory estimate of `t1 check` against measured peaks, on the CPU: resident memory of every rank over one RL step.

    python -m benchmarks.memory            # all cases, as in benchmarks/memory.md
    python -m benchmarks.memory --plan     # the table for Qwen2.5-32B on 2, 4 and 8 nodes, from the formulas
    python -m benchmarks.memory --long     # one sample of 32,768 tokens on 1, 2 and 4 context-parallel ranks
    python -m benchmarks.memory --rank ... # one rank (started by the above), --long-rank ... too

The measured figure is the highest resident size from before the model is built to the end of two steps (anchor,
forward, backward, optimizer, EMA), less what Python and the libraries took before. MALLOC_MMAP_THRESHOLD_ makes glibc
give every tensor back to the system when it is freed, as a GPU's allocator would reuse it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.published import write_config

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "67M, wide head": {"hidden": 512, "layers": 8, "ffn": 1536, "vocab": 40000, "tied": False},
    "54M, wide layers": {"hidden": 1024, "layers": 4, "ffn": 2816, "vocab": 4096, "tied": True},
}
LAYOUTS = {
    "one process": {},
    "TP2 SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2},
}
TOKENS = 2048
MICROBATCHES = 2
LONG_TOKENS = 32768
LONG_MODEL = {"hidden": 128, "layers": 2, "ffn": 256, "vocab": 320, "tied": True}


def peak_of(work: Callable[[], None]) -> int:
    """Bytes of resident memory at most while it runs, more than before."""

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM") - before


def rank(model_dir: str, layout: dict, dtype: str) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_t1.algo.config import CHUNK_LOGITS, LossConfig
    from megatron_t1.algo.loss import t1_token_loss
    from megatron_t1.check.estimate import Layout, stage_memory
    from megatron_t1.engine.anchor import Anchor
    from megatron_t1.engine.config import AnchorConfig, ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.prescore import prescore
    from megatron_t1.engine.step import Engine
    from megatron_t1.models import spec_of
    from megatron_t1.models.sizes import Sizes
    from megatron_t1.platform.detect import setup
    from megatron_t1.types import TrainSequence

    def step(engine: Engine, anchor: Anchor, length: int) -> None:
        rng = np.random.default_rng(0)
        sequences = [
            TrainSequence(
                prompt_ids=rng.integers(0, 99, 1), response_ids=rng.integers(0, 99, length - 1), advantage=1.0
            )
            for _ in range(MICROBATCHES * TOKENS // length)
        ]
        microbatches = engine.pack(sequences)
        assert len(microbatches) == MICROBATCHES
        prescore(engine, anchor, microbatches, sequences, LossConfig())
        engine.step(microbatches, MICROBATCHES * TOKENS, lambda *a: t1_token_loss(*a, cfg=LossConfig()))
        anchor.update()

    platform = setup()
    parallel = ParallelConfig(max_tokens_per_microbatch=TOKENS, **layout)
    initialize(parallel, platform, 0)
    torch.set_num_threads(1)
    dist.barrier()

    def two_steps() -> None:
        engine = Engine(
            ModelConfig(hf_path=model_dir, dtype=dtype),
            parallel, OptimConfig(lr=1e-3), platform, total_steps=9, temperature=1.2,
        )  # fmt: skip
        anchor = Anchor(engine, AnchorConfig())
        for _ in range(2):
            step(engine, anchor, 256)

    measured = peak_of(two_steps)
    sizes = Sizes.of(spec_of(Path(model_dir)))
    shape = Layout(
        tensor=parallel.tensor, pipeline=parallel.pipeline, data=1, sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=True, dtype=dtype, recompute=False, local_layers=True, tokens=TOKENS,
        microbatches=MICROBATCHES, chunk_logits=CHUNK_LOGITS["cpu"],
    )  # fmt: skip
    parts = stage_memory(sizes, shape, mpu.get_pipeline_model_parallel_rank())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {"measured": measured, "parts": parts})
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


def long_rank(model_dir: str, context: int, out: str) -> None:
    """Forward and backward of one sample; its loss, gradients and peaks are left in `out`."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from megatron_t1.algo.loss import sft_token_loss
    from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize
    from megatron_t1.engine.step import Engine
    from megatron_t1.platform.detect import setup
    from megatron_t1.types import TrainSequence
    from megatron_t1.weights.plan import Plan
    from tests.workers.gradients import gradient_pieces

    platform = setup()
    parallel = ParallelConfig(
        context=context, max_tokens_per_microbatch=LONG_TOKENS // context, distributed_optimizer=False
    )
    initialize(parallel, platform, 0)
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(0, LONG_MODEL["vocab"], LONG_TOKENS)
    sequences = [TrainSequence(prompt_ids=ids[:1], response_ids=ids[1:])]
    engine = Engine(
        ModelConfig(hf_path=model_dir, dtype="float32"),
        parallel, OptimConfig(lr=1e-3), platform, total_steps=1, temperature=1.0,
    )  # fmt: skip
    engine.load_weights(Path(model_dir))
    metrics = {}

    def step() -> None:
        metrics.update(engine.step(engine.pack(sequences), LONG_TOKENS - 1, sft_token_loss))

    peaks: list[int] = [0] * context
    dist.all_gather_object(peaks, peak_of(step))
    gradients = dict(Plan(gradient_pieces(engine)).gather())
    if dist.get_rank() == 0:
        save_file(gradients, f"{out}/{context}.safetensors")
        Path(f"{out}/{context}.json").write_text(json.dumps({**metrics, "peaks": peaks}))


def long() -> None:
    """The table of one long sample; every gradient against that of one rank."""
    from safetensors.torch import load_file

    from megatron_t1.algo.config import CHUNK_LOGITS
    from megatron_t1.check.estimate import Layout, Sizes, stage_memory
    from megatron_t1.models import spec_of

    print("| context | loss | gradient norm | gradients, worst relative error | peak MB by rank | estimate MB "
          "|\n" + "|---" * 6 + "|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make(Path(folder) / "model", LONG_MODEL)
        for context in (1, 2, 4):
            run("--long-rank", model_dir, str(context), folder, num_ranks=context)
            found = json.loads(Path(f"{folder}/{context}.json").read_text())
            one, these = (load_file(f"{folder}/{ranks}.safetensors") for ranks in (1, context))
            worst = max(float((these[name] - whole).norm() / whole.norm()) for name, whole in one.items())
            shape = Layout(
                tensor=1, context=context, pipeline=1, data=1, sequence_parallel=False, distributed_optimizer=False,
                dtype="float32", recompute=False, local_layers=True, tokens=LONG_TOKENS // context, microbatches=1,
                chunk_logits=CHUNK_LOGITS["cpu"], anchor="none",
            )  # fmt: skip
            parts = stage_memory(Sizes.of(spec_of(model_dir)), shape, 0)
            peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in found["peaks"])
            print(f"| {context} | {found['loss']:.7f} | {found['grad_norm']:.7f} | {worst:.1e} | {peaks} | "
                  f"{(parts['activations'] + parts['head']) / 1e6:.0f} |", flush=True)  # fmt: skip


def make(folder: Path, sizes: dict) -> Path:
    from tests.tiny import make_tiny_qwen2

    return make_tiny_qwen2(
        folder, vocab_size=sizes["vocab"], tied=sizes["tied"], hidden_size=sizes["hidden"], num_layers=sizes["layers"],
        num_heads=sizes["hidden"] // 64, num_kv_heads=sizes["hidden"] // 128, intermediate_size=sizes["ffn"],
        init_std=0.02,
    )  # fmt: skip


def measure(model_dir: Path, layout: dict, dtype: str) -> list[dict]:
    num_ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    return json.loads(run("--rank", model_dir, json.dumps(layout), dtype, num_ranks=num_ranks).splitlines()[-1])


def run(*arguments: str | Path, num_ranks: int) -> str:
    """What this script says with these arguments on so many ranks."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*(starter if num_ranks > 1 else starter[:1]), __file__, *arguments],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


def plan() -> None:
    from megatron_t1.check.estimate import stage_memory
    from megatron_t1.check.machines import Machines, layout_of, seconds_of
    from megatron_t1.cli.options import read
    from megatron_t1.config import Config
    from megatron_t1.models import spec_of
    from megatron_t1.models.sizes import Sizes

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_config(Path(folder), "qwen2.5-32b"))
        spec = spec_of(Path(model))
        for nodes, vllm_nodes, pipeline in ((2, 1, 1), (4, 2, 2), (8, 4, 2), (8, 4, 4)):
            options = ["--config", str(ROOT / "examples/qwen2.5-32b/rl.yaml"), "--model.hf_path", model]
            cfg = read(Config, [*options, "--parallel.pipeline", str(pipeline)])
            machines = Machines(nodes=nodes, vllm_nodes=vllm_nodes)
            layout = layout_of(cfg, spec, "rl", machines, {"train": 200})
            stages = [stage_memory(Sizes.of(spec), layout, stage) for stage in range(pipeline)]
            parts = max(stages, key=lambda parts: sum(parts.values()))
            total = sum(parts.values()) / 1e9
            seconds = seconds_of(cfg, spec, "rl", machines, {"train": 200})
            parts.pop("update")
            memory = " | ".join(f"{value / 1e9:.1f}" for value in parts.values())
            times = " | ".join(f"{value:.0f}" for value in seconds.values())
            rows.append(
                f"| {nodes} | {nodes - vllm_nodes} + {vllm_nodes} | 8 x {pipeline} x {layout.data} | "
                f"{'**does not fit:** ' if total > 76 else ''}{total:.1f} | {memory} | {sum(seconds.values()):.0f} | "
                f"{times} |"
            )
    heads = ["nodes", "train + vLLM", "TP x PP x DP", "GB", *parts, "s a step", *seconds]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, sep="\n")


def lengths() -> None:
    """The table of the smallest layouts by length."""
    from megatron_t1.check.machines import Machines, fullest, layout_of
    from megatron_t1.check.suggest import suggest
    from megatron_t1.cli.options import read
    from megatron_t1.config import Config
    from megatron_t1.models import spec_of
    from megatron_t1.models.sizes import Sizes

    heads = "nodes | train + vLLM | new tokens | TP x CP x PP x DP | recomputed | tokens on a rank | GB | activations"
    print(f"| {heads} | head |")
    print("|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_config(Path(folder), "qwen2.5-32b"))
        spec = spec_of(Path(model))
        for nodes, tokens in itertools.product((4, 8), (16384, 32768, 65536, 131072)):
            options = ["--config", str(ROOT / "examples/qwen2.5-32b/rl.yaml"), "--model.hf_path", model]
            cfg = read(Config, [*options, "--sampling.max_new_tokens", str(tokens)])
            machines, longest = Machines(nodes=nodes, vllm_nodes=nodes // 2), {"train": 2048}
            found = suggest(cfg, spec, "rl", machines, longest)
            where = f"| {nodes} | {nodes // 2} + {nodes // 2} | {tokens} |"
            if found is None:
                print(where, "nothing fits | | | | | |")
                continue
            layout = layout_of(found[0], spec, "rl", machines, longest)
            parts = fullest(Sizes.of(spec), layout)
            print(
                f"{where} {layout.tensor} x {layout.context} x {layout.pipeline} x {layout.data} | "
                f"{'all' if layout.recompute else 'nothing'} | {layout.tokens} | {found[1] / 1e9:.1f} | "
                f"{parts['activations'] / 1e9:.1f} | {parts['head'] / 1e9:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", nargs=3, metavar=("MODEL", "LAYOUT", "DTYPE"))
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--long-rank", nargs=3, metavar=("MODEL", "CONTEXT", "FOLDER"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--lengths", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.lengths:
        lengths()
        return
    if args.plan:
        plan()
        return
    if args.long:
        long()
        return
    if args.long_rank:
        model_dir, context, out = args.long_rank
        long_rank(model_dir, int(context), out)
        return
    if args.rank:
        model_dir, layout, dtype = args.rank
        rank(model_dir, json.loads(layout), dtype)
        return
    print("| model | layout | dtype | rank | measured MB | estimate MB | ratio | parts MB |\n" + "|---" * 8 + "|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model_dir = make(Path(folder), MODELS[name])
            for label in args.layouts:
                for dtype in args.dtypes:
                    for number, measured in enumerate(measure(model_dir, LAYOUTS[label], dtype)):
                        estimate = sum(measured["parts"].values())
                        parts = ", ".join(f"{part} {value / 1e6:.0f}" for part, value in measured["parts"].items())
                        print(
                            f"| {name} | {label} | {dtype} | {number} | {measured['measured'] / 1e6:.0f} | "
                            f"{estimate / 1e6:.0f} | {estimate / measured['measured']:.2f} | {parts} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
