"""Work of the data-parallel ranks by packing, ours and by tokens alone, beside a lower bound: the table of packing.md.

    python -m benchmarks.packing

No model is run: work is counted (`megatron_t1/models/sizes.py`) for Qwen2.5-32B. By tokens alone: longest first into
the emptiest microbatch, dealt to the ranks in turns, which is what megatron_t1 did before.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.published import write_config
from megatron_t1.data.balance import assign
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes


def distributions(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, int]]:
    """Name -> tokens of the sequences, tokens of a microbatch."""
    equal = np.tile(rng.lognormal(np.log(6000), 1.0, 32).clip(100, 32_768), 64)
    return {
        "the same 32 sequences on each of 64 ranks": (rng.permutation(equal), 65_536),
        "log-normal, median 4k, cut at 32k": (rng.lognormal(np.log(4000), 1.0, 2048).clip(100, 32_768), 34_816),
        "log-normal, median 12k, cut at 128k": (rng.lognormal(np.log(12_000), 1.0, 4096).clip(100, 131_072), 262_144),
        "bimodal: 20% near 30k, the rest near 2k": (
            np.r_[rng.normal(30_000, 1500, 410), rng.normal(2000, 500, 1638)].clip(100, 34_816), 34_816,
        ),
        "one of 128k, log-normal with median 6k": (
            np.r_[131_072, rng.lognormal(np.log(6000), 1.0, 4095).clip(100, 60_000)], 131_072,
        ),
        "one of 128k, 255 near 3k": (np.r_[131_072, rng.normal(3000, 500, 255).clip(100)], 131_072),
    }  # fmt: skip


def by_tokens(lengths: list[int], limit: int, dp_size: int) -> list[list[int]]:
    num_bins = -(-sum(lengths) // (limit * dp_size)) * dp_size
    while True:
        heap: list[tuple[int, int]] = [(0, b) for b in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            load, b = heap[0]
            if load + lengths[i] > limit:
                break
            bins[b].append(i)
            heapq.heapreplace(heap, (load + lengths[i], b))
        else:
            return bins
        num_bins += dp_size


def judged(
    lengths: list[int], limit: int, bins: list[list[int]], dp_size: int, attention: float
) -> tuple[float, float, float]:
    """Busiest rank's work by the mean, padding's share of tokens, busiest rank's work by the lower bound."""
    n = np.array(lengths, float)
    tokens = np.array([n[members].sum() for members in bins])
    size = tokens.max()
    squares = np.array([(n[members] ** 2).sum() for members in bins]) + (size - tokens) ** 2
    work = (size + attention * squares).reshape(-1, dp_size).sum(axis=0)
    # No fewer tokens than an even share, and than the longest sequence in each of the fewest microbatches; no fewer
    # squares than an even share, and than the longest sequence's own.
    fewest = -(-sum(lengths) // (limit * dp_size))
    bound = max(n.sum() / dp_size, fewest * n.max()) + attention * max((n**2).sum() / dp_size, n.max() ** 2)
    return work.max() / work.mean() - 1, 1 - n.sum() / (size * len(bins)), work.max() / bound - 1


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        attention = Sizes.of(spec_of(write_config(Path(folder), "qwen2.5-32b"))).attention
    print(f"attention costs as much as the matrices in a sequence of {1 / attention:.0f} tokens\n")
    print(
        "| sequences | ranks | microbatches | imbalance | padding | over the lower bound | CPU ms |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, (drawn, limit) in distributions(np.random.default_rng(0)).items():
        lengths = drawn.astype(int).tolist()
        for dp_size in (8, 64):
            before = by_tokens(lengths, limit, dp_size)
            began = time.process_time()
            bins = assign(lengths, limit, dp_size)
            took = time.process_time() - began
            rows = [judged(lengths, limit, each, dp_size, attention) for each in (before, bins)]
            cells = [f"{100 * old:.1f}% -> {100 * new:.1f}%" for old, new in zip(*rows, strict=True)]
            counts = f"{len(before) // dp_size} -> {len(bins) // dp_size}"
            print(f"| {len(lengths)}: {name} | {dp_size} | {counts} | {' | '.join(cells)} | {1000 * took:.0f} |")


if __name__ == "__main__":
    main()
