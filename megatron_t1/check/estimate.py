"""What a run will need, from its configuration alone: bytes on each GPU by part, seconds of a step by stage.

Memory. P parameters lie on a rank: layers / pipeline of them, each split by tensor but for the norms, and on the first
and last stage their share of the vocabulary. b bytes hold a number in model.dtype, D is the data-parallel size times
parallel.context, for experts the ranks of a stage with the same ones (1 when parallel.distributed_optimizer is off), s
the tokens of a microbatch on a rank, L the layers of a stage, t the tensor-parallel size, and u = t under sequence
parallelism, else 1.

    weights      b P
    gradients    4 P                       float32, one buffer
    optimizer    12 P / D in bfloat16      float32 weights and two moments; 8 P / D in float32, where the weights serve
    anchor       6 P in bfloat16           its float32 average and a copy in bfloat16; 4 P in float32; b P when it
                                           does not move (anchor.decay = 1), nothing at loss.kl_coef = 0 and in SFT
    fp8          2 M, with anchor 3 M      in FP8: the copies that Transformer Engine keeps of the layers' matrices, M
                                           parameters, with transposes, and of the anchor's
    activations  s L c m                   m = min(microbatches, p + 1) with p stages behind, what 1F1B keeps; with v
                                           chunks a stage min(microbatches, (2 p + (v - 1) stages + 1) / v)
                 c, bytes a token and layer: with Transformer Engine b (4 h / u + (3 q + 2 k + 3 f + e h) / t); with
                 the local layers (8 + b) 2 h / u + b (3 q + 2 k + 5 f + e h) / t, whose norms keep float32 (6 f in a
                 mixture); b h / u when all is recomputed (and then one layer's c besides). q, k, f: width of queries,
                 keys, MLP; e: the experts that each token is sent to, whose input is kept
    head         4 s_c V / t + 12 s h      the logits of one chunk of s_c tokens, hidden states and their gradients
    update       the largest tensor in float32, while the optimizer changes it, if that is more than the two above

A checkpoint needs no activations, and besides the first five, where D > 1,

    gather       4 P + 4 P / D on the GPU  one of the optimizer's three parts, sent and received
    host         (12 + b + 4) P            all that a rank writes; 8 P + 12 P / D more while it gathers

Time. A forward pass over a sequence of n tokens does 2 A (n + a n^2) flops: A parameters that a token meets, and a for
attention, which is causal (`Sizes.attention`; for Qwen2.5-32B a third more at 32k tokens, two thirds at 64k). Lengths
are taken as uniform up to the longest. A backward pass does twice that; full recomputation adds one forward. The
anchor's stage is a forward pass of the anchor, and where sums over samples are constants of the loss
(loss.kl_estimator = centered, importance and masks by sample) one of the policy besides.

    train        flops / (GPUs x peak x _TRAIN_SHARE)
    generate     decoding reads all weights and the cache of the samples under way for every token of each of them:
                 tokens of the longest sample x (weights + cache) / (tensor-parallel GPUs x bandwidth x _READ_SHARE),
                 repeated when the servers hold fewer samples than there are; more GPUs than KV heads hold copies
    push         b x parameters / (network of one GPU x _NET_SHARE) by collective; by tcp or shm, as where GPUs are
                 shared, / _HOST_BYTES_PER_S: each host fetches the model once

    turns        where servers share the GPUs: what parallel.offload moves, there and back, / (PCIe x _PCIE_SHARE), and
                 _SLEEP_S with rollout.sleep

With rl.lag a step takes as long as the slower of generate and the rest.

From a signal to stop to the end, at worst: it comes when the last microbatch of a step has begun.

    train        that microbatch through all stages: train x stages / (microbatches + stages - 1)
    push         of that step: it is finished
    generate     with rl.lag and rollout.pause_mode = wait: what is left of the batch that is made meanwhile
    earlier      the checkpoint of the step before, as far as it was not written beside the training
    collect      what a checkpoint takes of a rank's host / _COPY_BYTES_PER_S
    write        the checkpoint / (nodes that hold its first copy x _DISK_BYTES_PER_S)

The shares are what well-tuned systems reach, not what was measured here; the memory formulas were held to measured
peaks on the CPU (benchmarks/memory.md). Left out: fragmentation, and what CUDA and NCCL take for themselves; where
servers share the GPUs it counts (`CONTEXT_BYTES`).

A shared GPU. While servers that sleep otherwise generate, the trainer keeps the first five parts, with
parallel.offload = optimizer the weights alone, with all nothing. It moves optimizer and anchor average (12 P / D + 4 P
in bfloat16), with all the weights too. While it trains, the servers keep what they had, or asleep ASLEEP_BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_t1.models.sizes import Sizes

_TRAIN_SHARE, _READ_SHARE, _NET_SHARE = 0.40, 0.60, 0.50
AnchorKind = Literal["moving", "fixed", "none"]
_COPY_BYTES_PER_S = 3e9
"""Of one process, from its GPU into memory that is not pinned."""
CONTEXT_BYTES = 2e9
"""What CUDA and NCCL take of a GPU in a process that trains."""
ASLEEP_BYTES = 3e9
"""What vLLM keeps of a GPU in its sleep: context, CUDA graphs, libraries."""
_SLEEP_S = 2.0
"""For servers to fall asleep and wake up, without the push."""
_PCIE_SHARE = 0.75
"""Of the data sheet's, from and to pinned memory: 49 to 52 of 64 GB/s on an H200 (benchmarks/gpu.md)."""
_DISK_BYTES_PER_S = 1e9
"""Of a node, to and from a shared file system under load: many are faster, few slower."""
_HOST_BYTES_PER_S = 2e9
"""Of a push by tcp into one host, which the interface of its address must carry too (GLOO_SOCKET_IFNAME): 2.4 to 2.9
were measured over loopback (benchmarks/weight_sync.md)."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
_BETWEEN_STEPS = ("weights", "gradients", "optimizer", "anchor", "fp8")
"""Of `stage_memory`'s parts, those that stay."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator, by its data sheet."""

    memory_bytes: float
    flops_per_s: float
    """Dense bfloat16."""
    bytes_per_s: float
    """Memory bandwidth."""
    network_bytes_per_s: float
    """Of a node to others, for each of its GPUs."""
    host_bytes_per_s: float
    """To or from pinned memory of its host: PCIe x16 of generation 4 or 5."""


GPUS = {
    "A100": Gpu(
        memory_bytes=80e9, flops_per_s=312e12, bytes_per_s=2.0e12, network_bytes_per_s=25e9, host_bytes_per_s=32e9
    ),
    "H100": Gpu(
        memory_bytes=80e9, flops_per_s=989e12, bytes_per_s=3.35e12, network_bytes_per_s=50e9, host_bytes_per_s=64e9
    ),
    "H200": Gpu(
        memory_bytes=141e9, flops_per_s=989e12, bytes_per_s=4.8e12, network_bytes_per_s=50e9, host_bytes_per_s=64e9
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the trainer is laid out, and what one microbatch of it is."""

    tensor: int
    context: int = 1
    pipeline: int
    data: int
    expert: int = 1
    """Ranks that share one layer's experts: parallel.expert x parallel.expert_tensor."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage; empty: the same on all, rounded up."""
    sequence_parallel: bool
    distributed_optimizer: bool
    dtype: str
    recompute: bool
    fp8: bool = False
    local_layers: bool
    """Megatron's local layers with our norm and attention, not Transformer Engine's."""
    tokens: int
    """Of a microbatch on one rank, padding included."""
    microbatches: int
    """Of a step, on each data-parallel rank."""
    virtual_pipeline: int = 1
    """Chunks of the model that each stage holds."""
    experts_of_token: int = 0
    """Experts that each token is sent to; 0: the layers are dense."""
    chunk_logits: int
    """Logits that the head holds at a time (algo.config.CHUNK_LOGITS)."""
    anchor: AnchorKind = "moving"

    @property
    def copies(self) -> int:
        """Ranks with the same weights, over which the distributed optimizer spreads its state."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Ranks of a stage with the same experts."""
        return max(1, self.tensor * self.copies // self.expert)


def layers_of(sizes: Sizes, layout: Layout, stage: int) -> int:
    return layout.stage_layers[stage] if layout.stage_layers else math.ceil(sizes.num_layers / layout.pipeline)


def _own_layers(sizes: Sizes, layout: Layout, stage: int) -> slice:
    first = sum(layers_of(sizes, layout, before) for before in range(stage))
    return slice(first, first + layers_of(sizes, layout, stage))


def _matrices(sizes: Sizes, layout: Layout, stage: int) -> int:
    """Parameters of the layers' matrices on one rank of a pipeline stage."""
    own = _own_layers(sizes, layout, stage)
    return sum(sizes.split[own]) // layout.tensor + _in_experts(sizes, layout, stage)


def _in_experts(sizes: Sizes, layout: Layout, stage: int) -> int:
    return sum(sizes.experts[_own_layers(sizes, layout, stage)]) // layout.expert


def _by_copies(sizes: Sizes, layout: Layout, stage: int) -> list[tuple[int, int]]:
    """(parameters on one rank of a pipeline stage, D) of its experts, and of all others."""
    experts = _in_experts(sizes, layout, stage)
    others = parameters(sizes, layout, stage) - experts
    if not layout.distributed_optimizer:
        return [(experts, 1), (others, 1)]
    return [(experts, layout.expert_copies), (others, layout.copies)]


def parameters(sizes: Sizes, layout: Layout, stage: int) -> int:
    """Parameters on one rank of a pipeline stage."""
    vocabulary = -(-sizes.vocab // layout.tensor) * sizes.hidden
    count = _matrices(sizes, layout, stage) + sum(sizes.whole[_own_layers(sizes, layout, stage)])
    last = stage == layout.pipeline - 1
    if stage == 0:
        count += vocabulary
    if last:
        count += sizes.hidden
        if not (sizes.tied and layout.pipeline == 1):  # tied embeddings are copied to the last stage
            count += vocabulary
    return count


def _under_way(layout: Layout, stage: int) -> float:
    """Microbatches whose activations a stage keeps at most: those of Megatron's warm-up, and one."""
    behind, chunks = layout.pipeline - stage - 1, layout.virtual_pipeline
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * layout.pipeline
    return min(layout.microbatches, (warm_up + 1) / chunks)


def stage_memory(sizes: Sizes, layout: Layout, stage: int) -> dict[str, float]:
    """Bytes on one rank of a pipeline stage, by part; the formulas are in the module's docstring."""
    b, p = _BYTES[layout.dtype], parameters(sizes, layout, stage)
    narrow = b < 4
    t, u = layout.tensor, layout.tensor if layout.sequence_parallel else 1
    h, layers = sizes.hidden, layers_of(sizes, layout, stage)
    of_mlp = 3 if not layout.local_layers else 6 if layout.experts_of_token else 5
    split = 3 * sizes.query + 2 * sizes.key + of_mlp * sizes.mlp + layout.experts_of_token * h
    per_token = (2 * (8 + b) if layout.local_layers else 4 * b) * h / u + b * split / t
    kept = layers * (b * h / u if layout.recompute else per_token)
    activations = layout.tokens * (kept * _under_way(layout, stage) + (per_token if layout.recompute else 0))
    vocabulary = -(-sizes.vocab // t)
    head = 0.0
    if stage == layout.pipeline - 1:
        chunks = math.ceil(layout.tokens / max(1, layout.chunk_logits // vocabulary))
        head = 4 * math.ceil(layout.tokens / chunks) * vocabulary + 12 * layout.tokens * h
    largest = max(vocabulary * h if stage in (0, layout.pipeline - 1) else 0, 2 * h * sizes.mlp // t)
    return {
        "weights": b * p,
        "gradients": 4.0 * p,
        "optimizer": sum((12 if narrow else 8) * n / copies for n, copies in _by_copies(sizes, layout, stage)),
        "anchor": {"moving": 6.0 if narrow else 4.0, "fixed": b, "none": 0.0}[layout.anchor] * p,
        "fp8": layout.fp8 * (2.0 if layout.anchor == "none" else 3.0) * _matrices(sizes, layout, stage),
        "activations": activations,
        "head": head,
        "update": max(0.0, 4.0 * largest - activations - head),
    }


def checkpoint_memory(sizes: Sizes, layout: Layout, stage: int) -> tuple[float, float]:
    """Bytes on the GPU and on the host of one rank of a pipeline stage while a checkpoint is written."""
    b, p = _BYTES[layout.dtype], parameters(sizes, layout, stage)
    parts = stage_memory(sizes, layout, stage)
    gpu: float = sum(parts[name] for name in _BETWEEN_STEPS)
    host: float = (12 + b + 4) * p
    for n, copies in _by_copies(sizes, layout, stage):
        if copies > 1:
            gpu += 4 * n + 4 * n / copies
            host += 8 * n + 12 * n / copies
    return gpu, host


def most_of_checkpoint(sizes: Sizes, layout: Layout) -> tuple[float, float]:
    """`checkpoint_memory`, each of the pipeline stage that takes most."""
    gpu, host = zip(*(checkpoint_memory(sizes, layout, stage) for stage in range(layout.pipeline)), strict=True)
    return max(gpu), max(host)


def kept_bytes(parts: Mapping[str, float], offload: str) -> float:
    """Of `stage_memory`'s parts, what a trainer that gives memory away keeps while servers generate."""
    kept = {"none": _BETWEEN_STEPS, "optimizer": ("weights",), "all": ()}[offload]
    return sum(parts[name] for name in kept)


def moved_bytes(parts: Mapping[str, float], layout: Layout, offload: str) -> float:
    """What `parallel.offload` brings from one rank to its host, and back."""
    if offload == "none":
        return 0.0
    # The copy of a moving average is made anew.
    copy = parts["weights"] if layout.anchor == "moving" and _BYTES[layout.dtype] < 4 else 0.0
    return parts["optimizer"] + parts["anchor"] - copy + (parts["weights"] if offload == "all" else 0.0)


def turn_seconds(moved: float, gpu: Gpu, *, sleep: bool) -> float:
    """Of a step, to give the memory of a shared GPU to the servers and back."""
    return 2 * moved / (gpu.host_bytes_per_s * _PCIE_SHARE) + (_SLEEP_S if sleep else 0.0)


def stop_seconds(
    sizes: Sizes, layout: Layout, step: Mapping[str, float], checkpoint: float, nodes: int, *, awaits_batch: bool
) -> dict[str, float]:
    """Seconds from a signal to stop to the end by part, at worst.

    Args:
        step: seconds of a step by stage.
        checkpoint: bytes of one.
        nodes: that write.
        awaits_batch: the next batch is being made and has to be finished.
    """
    collected = most_of_checkpoint(sizes, layout)[1]
    disk = checkpoint / (nodes * _DISK_BYTES_PER_S)
    finished = {"train": step["train"] * layout.pipeline / (layout.microbatches + layout.pipeline - 1)}
    if "push" in step:
        finished["push"] = step["push"]
    if awaits_batch:
        finished["generate"] = max(0.0, step["generate"] - step["train"])
    finished["earlier"] = max(0.0, disk - step["train"])
    return {**finished, "collect": collected / _COPY_BYTES_PER_S, "write": disk}


def checkpoint_bytes(sizes: Sizes, dtype: str, anchor: AnchorKind) -> float:
    """One checkpoint with optimizer and anchor."""
    b = _BYTES[dtype]
    return sizes.total * (b + (12 if b < 4 else 8) + {"moving": 4, "fixed": b, "none": 0}[anchor])


def weight_bytes(sizes: Sizes, dtype: str) -> float:
    """Of one model."""
    return _BYTES[dtype] * sizes.total


def cache_tokens(sizes: Sizes, gpu: Gpu, tp: int, dtype: str, utilization: float, kv_copies: int = 1) -> float:
    """Tokens whose keys and values one vLLM server can hold; 4 GB a GPU are left to its own work.

    Args:
        kv_copies: of its GPUs that hold the same KV head.
    """
    b = _BYTES[dtype]
    free = tp * (gpu.memory_bytes * utilization - 4e9) - b * sizes.total
    return max(0.0, free / (2 * b * kv_copies * sizes.key * sizes.num_layers))


def step_seconds(
    sizes: Sizes,
    layout: Layout,
    gpu: Gpu,
    *,
    servers: int,
    server_tp: int,
    server_dtype: str,
    kv_copies: int,
    num_samples: int,
    prompt_tokens: float,
    mean_tokens: float,
    max_tokens: int,
    max_num_seqs: int,
    utilization: float,
    score_passes: int,
    by_host: bool,
) -> dict[str, float]:
    """Seconds of an RL step by stage, for `num_samples` samples of `mean_tokens` tokens, the longest `max_tokens`."""
    b = _BYTES[server_dtype]
    holds = cache_tokens(sizes, gpu, server_tp, server_dtype, utilization, kv_copies)
    fits = holds / (prompt_tokens + mean_tokens)
    together = max(1.0, min(max_num_seqs, num_samples / servers, fits))
    rounds = max(1.0, num_samples / servers / together)
    cache = together * (prompt_tokens + mean_tokens / 2) * 2 * b * kv_copies * sizes.key * sizes.num_layers
    per_token_s = (b * sizes.total + cache) / (server_tp * gpu.bytes_per_s * _READ_SHARE)
    # Rounds overlap: a finished sample makes room at once, so only the last one waits for the longest.
    generate = per_token_s * ((rounds - 1) * mean_tokens + max_tokens)

    work = num_samples * sequence_work(sizes, prompt_tokens + mean_tokens, prompt_tokens + max_tokens)
    push_rate = _HOST_BYTES_PER_S if by_host else gpu.network_bytes_per_s * _NET_SHARE
    return {
        "generate": generate,
        "anchor": score_passes * pass_seconds(sizes, layout, gpu, work),
        "train": train_seconds(sizes, layout, gpu, work),
        "push": _BYTES[layout.dtype] * sizes.total / push_rate,
    }


def sequence_work(sizes: Sizes, mean_tokens: float, max_tokens: float) -> float:
    """What a sequence costs on average, in tokens without attention, when lengths spread evenly about their mean up to
    the longest: n + a E[n^2]."""
    return mean_tokens + sizes.attention * (mean_tokens**2 + (max_tokens - mean_tokens) ** 2 / 3)


def pass_seconds(sizes: Sizes, layout: Layout, gpu: Gpu, work: float) -> float:
    """One forward pass over `work` (`sequence_work` of all sequences) on all of the trainer's GPUs."""
    gpus = layout.tensor * layout.pipeline * layout.copies
    bubble = 1 + (layout.pipeline - 1) / (layout.microbatches * layout.virtual_pipeline)
    return 2 * sizes.active * work / (gpus * gpu.flops_per_s * _TRAIN_SHARE) * bubble


def train_seconds(sizes: Sizes, layout: Layout, gpu: Gpu, work: float) -> float:
    """Forward and backward pass."""
    return (4 if layout.recompute else 3) * pass_seconds(sizes, layout, gpu, work)
