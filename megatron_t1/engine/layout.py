"""What a layout asks of the number of processes and of a model's sizes."""

from __future__ import annotations

import math

from megatron_t1.engine.config import ParallelConfig
from megatron_t1.models.spec import ModelSpec


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """
    Raises:
        ValueError: so many trainer processes can't be laid out so.
    """
    of_experts = {"expert_tensor": parallel.expert_tensor or parallel.tensor, "expert": parallel.expert}
    for sizes in ({"tensor": parallel.tensor, "context": parallel.context}, of_experts):
        sizes = {**sizes, "pipeline": parallel.pipeline}
        if world_size % (size := math.prod(sizes.values())) or not world_size:
            names = " x ".join(f"parallel.{name}" for name in sizes)
            raise ValueError(
                f"{world_size} trainer processes do not divide by {names} = {' x '.join(map(str, sizes.values()))}; "
                f"start a multiple of {size}"
            )


def check_divisible(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Refuse, with the numbers, a layout that the model's sizes do not divide by."""
    sizes = spec.transformer
    tensor, kv_heads = parallel.tensor, sizes["num_query_groups"]
    cuts = [
        ("num_attention_heads", "tensor", tensor),
        ("ffn_hidden_size", "tensor", tensor),
        ("moe_shared_expert_intermediate_size", "tensor", tensor),
        ("moe_ffn_hidden_size", "expert_tensor", parallel.expert_tensor or tensor),
        ("num_moe_experts", "expert", parallel.expert),
    ]
    problems = [
        f"{what} = {sizes[what]} does not divide by parallel.{group} = {size}"
        for what, group, size in cuts
        if sizes.get(what) and sizes[what] % size
    ]
    if kv_heads % tensor and tensor % kv_heads:
        problems.append(f"num_query_groups = {kv_heads} neither divides parallel.tensor = {tensor} nor is a multiple")
    rows = (sizes["num_attention_heads"] + 2 * kv_heads) * sizes["kv_channels"]
    if rows % tensor:
        problems.append(f"the {rows} rows of the QKV projection do not divide by parallel.tensor = {tensor}")
    try:
        parallel.layers_of_stages(sizes["num_layers"])
    except ValueError as error:
        problems.append(str(error))
    if "num_moe_experts" not in sizes:
        if parallel.expert > 1:
            problems.append(f"it has no experts to spread over parallel.expert = {parallel.expert} ranks")
    elif tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"a mixture of experts with parallel.tensor = {tensor} needs parallel.sequence_parallel = true (Megatron)"
        )
    if problems:
        raise ValueError(f"{spec.architecture}: " + "; ".join(problems))
