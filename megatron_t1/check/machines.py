"""The machines that a run is planned for, and how it is laid out on them: what `estimate.py` puts a price on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_t1.algo.config import CHUNK_LOGITS
from megatron_t1.check import estimate
from megatron_t1.config import Config
from megatron_t1.models.sizes import Sizes
from megatron_t1.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines that the run is checked for."""

    nodes: int = 1
    """Nodes in all."""
    vllm_nodes: int = 0
    """Of them for vLLM alone; 0: every node both trains and serves."""
    gpus_per_node: int = 8
    vllm_gpus: int | None = None
    """Of every node, when `vllm_nodes` is 0; None: half of them, or with `share_gpus` all."""
    share_gpus: bool = False
    """Trainer ranks are on all GPUs of a node, servers on those for vLLM as well (`rollout.share_gpus`)."""
    ranks_per_node: int | None = None
    """Trainer processes on a node; None: one on each of its GPUs that is not vLLM's."""
    gpu: str = "H100"
    """Which one: A100, H100, H200."""
    gpu_memory_bytes: float = math.inf
    """What this host's GPU has, where the run is on such ones: cards of one name come with less, and unknown ones."""
    grace_s: float | None = None
    """Seconds that a trainer has from USR1 to its end; None: not said."""

    def __post_init__(self) -> None:
        if self.gpu not in estimate.GPUS:
            raise ValueError(f"gpu = {self.gpu!r}: known are {', '.join(estimate.GPUS)}")
        for name in ("nodes", "gpus_per_node", "ranks_per_node"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name} = {given} must be at least 1")
        if not 0 <= self.vllm_nodes < self.nodes:
            raise ValueError(
                f"vllm_nodes = {self.vllm_nodes} must leave one of the {self.nodes} nodes to train: lower it "
                "(VLLM_NODES in a batch script) or ask for more nodes"
            )
        if self.share_gpus and self.vllm_nodes:
            raise ValueError(
                f"rollout.share_gpus and vllm_nodes = {self.vllm_nodes}: nodes for vLLM alone share no GPU; set it "
                "(VLLM_NODES in a batch script) to 0"
            )
        if not 0 <= self.vllm_gpus_of_node <= self.gpus_per_node:
            raise ValueError(f"vllm_gpus = {self.vllm_gpus} of {self.gpus_per_node} GPUs of a node")

    @property
    def accelerator(self) -> estimate.Gpu:
        sheet = estimate.GPUS[self.gpu]
        return replace(sheet, memory_bytes=min(sheet.memory_bytes, self.gpu_memory_bytes))

    @property
    def vllm_gpus_of_node(self) -> int:
        """On a node that trains too."""
        if self.vllm_gpus is None:
            return self.gpus_per_node if self.share_gpus else self.gpus_per_node // 2
        return self.vllm_gpus

    def trainer_nodes(self, command: str) -> int:
        return self.nodes - (self.vllm_nodes if command == "rl" else 0)

    def ranks_on_node(self, command: str) -> int:
        return self.ranks(command) // self.trainer_nodes(command)

    def splits_nodes(self, command: str) -> bool:
        """Whether some GPUs of every node train and the others serve."""
        return command in ("rl", "run") and self.vllm_nodes == 0 and not self.share_gpus and not self.ranks_per_node

    def ranks(self, command: str) -> int:
        each = self.ranks_per_node or self.gpus_per_node - (self.vllm_gpus_of_node if self.splits_nodes(command) else 0)
        return self.trainer_nodes(command) * each

    def gpus_of_servers(self, command: str) -> int:
        """Of a node that serves."""
        alone = self.vllm_nodes or command not in ("rl", "run")
        return self.gpus_per_node if alone else self.vllm_gpus_of_node

    def servers(self, tp: int) -> int:
        return max(1, (self.vllm_nodes or self.nodes) * (self.gpus_of_servers("rl") // tp))


def kv_copies(spec: ModelSpec, tp: int) -> int:
    """GPUs of a vLLM server that hold the same KV head."""
    return max(1, tp // int(spec.transformer["num_query_groups"]))


def layout_of(
    cfg: Config, spec: ModelSpec, command: str, machines: Machines, longest: dict[str, int]
) -> estimate.Layout:
    pipeline = cfg.parallel.pipeline
    try:
        chunks = cfg.parallel.layers_of_stages(spec.transformer["num_layers"])
    except ValueError:  # a problem that `check_divisible` told
        chunks = ()
    context = cfg.parallel.context
    data = max(1, machines.ranks(command) // (cfg.parallel.tensor * context * cfg.parallel.pipeline))
    room = cfg.parallel.max_tokens_per_microbatch
    if command == "sft":
        tokens = cfg.sft.batch_size * longest.get("sft", room * context)
    else:
        samples = cfg.rl.prompts_per_step * cfg.sampling.num_samples
        tokens = samples * (longest.get("train", 0) + cfg.sampling.max_new_tokens // 2)
    of_rank = tokens / (data * context)
    return estimate.Layout(
        tensor=cfg.parallel.tensor,
        context=context,
        pipeline=pipeline,
        stage_layers=tuple(sum(chunks[stage::pipeline]) for stage in range(pipeline)) if chunks else (),
        data=data,
        expert=cfg.parallel.expert * (cfg.parallel.expert_tensor or cfg.parallel.tensor),
        sequence_parallel=cfg.parallel.sequence_parallel,
        distributed_optimizer=cfg.parallel.distributed_optimizer,
        dtype=cfg.model.dtype,
        recompute=cfg.model.transformer.get("recompute_granularity") == "full",
        fp8=bool(cfg.model.transformer.get("fp8")),
        local_layers=cfg.model.layers == "local" or cfg.model.dtype == "float32",
        tokens=min(room, math.ceil(of_rank)),
        microbatches=max(1, math.ceil(of_rank / room)),
        virtual_pipeline=cfg.parallel.virtual_pipeline,
        experts_of_token=spec.transformer["moe_router_topk"] if spec.transformer.get("num_moe_experts") else 0,
        chunk_logits=CHUNK_LOGITS["cuda"],
        anchor="none" if command == "sft" or not cfg.loss.kl_coef else "moving" if cfg.anchor.decay < 1 else "fixed",
    )


def seconds_of(
    cfg: Config, spec: ModelSpec, command: str, machines: Machines, longest: dict[str, int]
) -> dict[str, float]:
    """Of a step, by stage."""
    sizes, gpu = Sizes.of(spec), machines.accelerator
    layout = layout_of(cfg, spec, command, machines, longest)
    if command == "sft":
        each = longest.get("sft", cfg.parallel.max_tokens_per_microbatch * cfg.parallel.context)
        work = cfg.sft.batch_size * estimate.sequence_work(sizes, each, each)
        return {"train": estimate.train_seconds(sizes, layout, gpu, work)}
    seconds = estimate.step_seconds(
        sizes,
        layout,
        gpu,
        servers=machines.servers(cfg.rollout.tp),
        server_tp=cfg.rollout.tp,
        server_dtype=cfg.server_dtype,
        kv_copies=kv_copies(spec, cfg.rollout.tp),
        num_samples=cfg.rl.prompts_per_step * cfg.sampling.num_samples,
        prompt_tokens=longest.get("train", 200),
        mean_tokens=cfg.sampling.max_new_tokens / 2,
        max_tokens=cfg.sampling.max_new_tokens,
        max_num_seqs=cfg.rollout.max_num_seqs,
        utilization=cfg.rollout.gpu_memory_utilization,
        score_passes=(cfg.loss.kl_coef > 0) + cfg.loss.scores_policy,
        by_host=cfg.rollout.share_gpus or cfg.rollout.transport in ("shm", "tcp"),
    )
    if cfg.takes_turns:
        moved = estimate.moved_bytes(fullest(sizes, layout), layout, cfg.parallel.offload)
        seconds["turns"] = estimate.turn_seconds(moved, gpu, sleep=cfg.rollout.sleep)
    return seconds


def nodes_that_write(layout: estimate.Layout, ranks_per_node: int) -> int:
    """Nodes of the ranks that write a checkpoint: of each pipeline stage the first ones, which hold a whole copy of it
    (Megatron counts ranks along tensor, context or expert, data, then pipeline)."""
    stage, copy = layout.tensor * layout.context * layout.data, max(layout.tensor, layout.expert)
    return len(
        {(first + rank) // ranks_per_node for first in range(0, layout.pipeline * stage, stage) for rank in range(copy)}
    )


def fullest(sizes: estimate.Sizes, layout: estimate.Layout) -> dict[str, float]:
    """`stage_memory` of the pipeline stage that takes most."""
    stages = (estimate.stage_memory(sizes, layout, number) for number in range(layout.pipeline))
    return max(stages, key=lambda parts: sum(parts.values()))
