"""Seconds of an RL step by layout: a simulation of the servers, sample by sample, on nodes of 8 H100s.

    python -m benchmarks.step_time           # the tables of benchmarks/step_time.md

Training, the anchor's stage, pushes, the servers' memory and a token's time are the formulas of `t1 check`
(megatron_t1/check/estimate.py); what is simulated is what these take on average: samples of different lengths that
start when there is room for them, and the longest of a batch that others wait for.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.published import write_config
from megatron_t1.check import estimate
from megatron_t1.check.machines import Machines, fullest, layout_of, seconds_of
from megatron_t1.cli.options import read
from megatron_t1.config import Config
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = {
    "log-normal, mean 4,096, cut at 8,192": (4096, 8192),
    "log-normal, mean 8,192, cut at 16,384": (8192, 16384),
}
PROMPT = 200
STEPS = 6
SHARING = ("--rollout.share_gpus", "true", "--rollout.gpu_memory_utilization")
TURNS = ("--config", str(ROOT / "examples/shared_gpus.yaml"))
TITLES = "s a step | generate | anchor | train | push | turns | trainer idle | servers idle | GB | together"


@dataclass
class Server:
    """One vLLM server: decodes all that it holds token by token."""

    weights_s: float
    """To read the weights once, at each token."""
    cached_token_s: float
    """To read the keys and values of one token of a sample."""
    max_num_seqs: int
    room: float
    """Tokens that its cache holds."""

    def seconds(self, lengths: np.ndarray) -> tuple[float, float]:
        """(until all samples are there, mean number held together), started in the order given."""
        waiting = list(lengths[::-1])
        active: list[tuple[float, float]] = []  # (tokens decoded when it ends, tokens decoded when it began)
        clock, decoded, held = 0.0, 0.0, 0.0
        while waiting or active:
            used = sum(
                PROMPT + end - began for end, began in active
            )  # vLLM would preempt: here room is kept to the end
            while waiting and len(active) < self.max_num_seqs and used + PROMPT + waiting[-1] <= self.room:
                length = waiting.pop()
                heapq.heappush(active, (decoded + length, decoded))
                used += PROMPT + length
            end = active[0][0]
            tokens = end - decoded
            cached = sum(PROMPT + decoded - began + tokens / 2 for _, began in active)
            duration = tokens * (self.weights_s + cached * self.cached_token_s)
            clock, decoded, held = clock + duration, end, held + duration * len(active)
            while active and active[0][0] <= decoded:
                heapq.heappop(active)
        return clock, held / clock


def lengths(mean: int, cut: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal with a standard deviation of 0.6 in its logarithm, which is cut, and scaled to the mean."""
    drawn = rng.lognormal(0.0, 0.6, 1 << 16)
    low, high = 1.0, float(cut)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(drawn * middle, cut).mean() < mean else (low, middle)
    return np.minimum(rng.lognormal(0.0, 0.6, count) * low, cut).round()


def row(name: str, cfg: Config, machines: Machines, mean: int, cut: int) -> tuple[str, float]:
    spec = spec_of(Path(cfg.model.hf_path))
    sizes, gpu = Sizes.of(spec), estimate.GPUS[machines.gpu]
    fixed = seconds_of(cfg, spec, "rl", machines, {"train": PROMPT})
    rest = sum(value for stage, value in fixed.items() if stage != "generate")
    count, tp = machines.servers(cfg.rollout.tp), cfg.rollout.tp
    holds = estimate.cache_tokens(sizes, gpu, tp, "bfloat16", cfg.rollout.gpu_memory_utilization)
    # What decoding takes is linear in what is cached: two of the estimate's figures give both terms.
    rate = tp * gpu.bytes_per_s * estimate._READ_SHARE
    server = Server(
        weights_s=2 * sizes.total / rate,
        cached_token_s=2 * 2 * sizes.key * sizes.num_layers / rate,
        max_num_seqs=cfg.rollout.max_num_seqs,
        room=holds,
    )
    rng, num_samples = np.random.default_rng(0), cfg.rl.prompts_per_step * cfg.sampling.num_samples
    generate, held = [], []
    for _ in range(STEPS):
        shares = np.array_split(lengths(mean, cut, num_samples, rng), count)
        ended, together = zip(*(server.seconds(share) for share in shares), strict=True)
        generate.append(max(ended))
        held.append(np.mean(together))
    made = float(np.mean(generate))
    step = max(made, rest) if cfg.rl.lag else made + rest
    memory = fullest(sizes, layout_of(cfg, spec, "rl", machines, {"train": PROMPT}))
    stages = " | ".join(f"{fixed.get(stage, 0):.0f}" for stage in ("anchor", "train", "push", "turns"))
    shares_idle = f"{100 * (1 - (fixed['anchor'] + fixed['train']) / step):.0f}% | {100 * (1 - made / step):.0f}%"
    taken = f"{sum(memory.values()) / 1e9:.0f}"
    return f"| {name} | **{step:.0f}** | {made:.0f} | {stages} | {shares_idle} | {taken} | {np.mean(held):.0f} |", step


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layouts_of_32b(Path(folder))
        shared(Path(folder))


def example(folder: Path, name: str, *options: str) -> Config:
    words = ["--config", str(ROOT / f"examples/{name}/rl.yaml"), "--model.hf_path", str(write_config(folder, name))]
    return read(Config, [*words, *options])


def layouts_of_32b(folder: Path) -> None:
    separate, shared = {"nodes": 4, "vllm_nodes": 2}, {"nodes": 4, "share_gpus": True}
    for title, (mean, cut) in LENGTHS.items():
        print(f"\n{title}\n\n| layout | {TITLES} |\n|{'---|' * 11}")
        steps = []
        for name, machines, options in (
            ("2 nodes train, 2 serve", separate, []),
            ("the same, rl.lag 1", separate, ["--rl.lag", "1"]),
            ("4 nodes share", shared, [*SHARING, "0.33"]),
            ("4 nodes share, servers sleep", shared, [*SHARING, "0.48", "--rollout.sleep", "true"]),
            ("the same, parallel.offload optimizer", shared, TURNS),
            ("the same, parallel.offload all", shared,
             [*TURNS, "--rollout.gpu_memory_utilization", "0.94", "--parallel.offload", "all"]),
        ):  # fmt: skip
            cfg = example(folder, "qwen2.5-32b", "--sampling.max_new_tokens", str(cut), *options)
            line, step = row(name, cfg, Machines(**machines), mean, cut)
            steps.append(step)
            print(line)
        print(f"\nAgainst the first: {', '.join(f'{steps[0] / step:.2f} x' for step in steps)}")


def shared(folder: Path) -> None:
    """Every example on the fewest nodes, by `examples/shared_gpus.yaml`."""
    print(f"\n| model, nodes, TP x PP x DP | {TITLES} | pinned GB a node |\n|{'---|' * 12}")
    for name, nodes in (("glm-4-9b", 1), ("qwen2.5-14b", 1), ("qwen2.5-32b", 2), ("qwen2.5-32b", 4)):
        cfg, machines = example(folder, name, *TURNS), Machines(nodes=nodes, share_gpus=True)
        spec, cut = spec_of(Path(cfg.model.hf_path)), cfg.sampling.max_new_tokens
        layout = layout_of(cfg, spec, "rl", machines, {"train": PROMPT})
        pinned = estimate.moved_bytes(fullest(Sizes.of(spec), layout), layout, cfg.parallel.offload)
        title = f"{name}, {nodes}, {layout.tensor} x {layout.pipeline} x {layout.data}"
        print(row(title, cfg, machines, cut // 2, cut)[0], f"{8 * pinned / 1e9:.0f} |")


if __name__ == "__main__":
    main()
