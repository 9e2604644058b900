"""What a layout asks of the number of processes and of a model's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_t1.engine.config import ParallelConfig, fp8_multiple
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


def check_divisible(
    spec: ModelSpec, parallel: ParallelConfig, transformer: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse, with the numbers, a layout that the model's sizes (or `model.transformer`) do not go with."""
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
    kv_heads = max(1, kv_heads // tensor)
    if transformer.get("cp_comm_type") == "a2a" and kv_heads % parallel.context:
        problems.append(
            f"model.transformer.cp_comm_type = a2a: the {kv_heads} KV heads of a rank do not divide by "
            f"parallel.context = {parallel.context}, give p2p"
        )
    if transformer.get("apply_rope_fusion") and spec.yarn:
        problems.append(
            "model.transformer.apply_rope_fusion = True: the fused kernel leaves out the factor that YaRN puts on "
            "queries and keys, remove the setting"
        )
    if (multiple := fp8_multiple(transformer)) > 1:
        problems += [
            f"model.transformer.fp8: {what} = {size} of a rank is no multiple of {multiple}, lower parallel.{group} or "
            "leave FP8 out"
            for what, group, size in _fp8_sizes(sizes, parallel, transformer)
            if size % multiple
        ]
    try:
        parallel.layers_of_stages(sizes["num_layers"])
    except ValueError as error:
        problems.append(str(error))
    if "num_moe_experts" not in sizes:
        if parallel.expert > 1:
            problems.append(f"it has no experts to spread over parallel.expert = {parallel.expert} ranks")
    else:
        if tensor > 1 and not parallel.sequence_parallel:
            problems.append(
                f"a mixture of experts with parallel.tensor = {tensor} needs parallel.sequence_parallel = true "
                "(Megatron)"
            )
        if parallel.expert == 1 and parallel.expert_tensor not in (0, tensor):
            problems.append(
                f"parallel.expert_tensor = {parallel.expert_tensor} beside parallel.tensor = {tensor} needs "
                "parallel.expert above 1: Megatron would reduce the experts' gradients as those of the other layers"
            )
    if problems:
        raise ValueError(f"{spec.architecture}: " + "; ".join(problems))


def _fp8_sizes(
    sizes: Mapping[str, Any], parallel: ParallelConfig, transformer: Mapping[str, Any]
) -> list[tuple[str, str, int]]:
    """(what, the setting that cuts it, its numbers on a rank) of the matrices in the layers that compute in FP8."""
    kinds, tensor = sizes.get("moe_layer_freq", 1), parallel.tensor
    if not isinstance(kinds, list):
        kinds = [int("num_moe_experts" in sizes)] * sizes["num_layers"]
    if transformer.get("first_last_layers_bf16"):
        at_start, at_end = (transformer.get(f"num_layers_at_{end}_in_bf16", 1) for end in ("start", "end"))
        kinds = kinds[at_start : len(kinds) - at_end]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_query_groups"]
    found = [
        ("num_attention_heads x kv_channels", "tensor", heads * sizes["kv_channels"] // tensor),
        ("the QKV projection's rows", "tensor", (heads + 2 * kv_heads) * sizes["kv_channels"] // tensor),
    ]
    if 0 in kinds:
        found.append(("ffn_hidden_size", "tensor", sizes["ffn_hidden_size"] // tensor))
    if 1 in kinds:
        expert_tensor = parallel.expert_tensor or tensor
        found.append(("moe_ffn_hidden_size", "expert_tensor", sizes["moe_ffn_hidden_size"] // expert_tensor))
        shared = sizes.get("moe_shared_expert_intermediate_size") or 0
        found.append(("moe_shared_expert_intermediate_size", "tensor", shared // tensor))
    return found
