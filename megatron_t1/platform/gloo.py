"""What the collectives of gloo lack of NCCL's, for tokens that go to their experts and back.

Each rank has another number of them: NCCL gathers and scatters parts of different lengths, gloo equal ones only. And
the split sizes, which Megatron copies from CUDA into numbers, are left as tensors where there is no CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_to_all_single, _all_gather, _reduce_scatter = dist.all_to_all_single, dist.all_gather, dist.reduce_scatter


def install() -> None:
    module: Any = dist
    module.all_to_all_single = all_to_all_single
    module.all_gather = all_gather
    module.reduce_scatter = reduce_scatter


def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    for name in ("output_split_sizes", "input_split_sizes"):
        if isinstance(kwargs.get(name), Tensor):
            kwargs[name] = kwargs[name].tolist()
    return _all_to_all_single(output, input, *args, **kwargs)


def all_gather(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    longest = _longest(tensor_list)
    if longest is None:
        return _all_gather(tensor_list, tensor, *args, **kwargs)
    padded = [part.new_empty(longest, *part.shape[1:]) for part in tensor_list]
    _all_gather(padded, _pad(tensor, longest), *args, **kwargs)
    for part, received in zip(tensor_list, padded, strict=True):
        part.copy_(received[: len(part)])
    return None


def reduce_scatter(output: Tensor, input_list: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    longest = _longest(input_list)
    if longest is None:
        return _reduce_scatter(output, input_list, *args, **kwargs)
    padded = output.new_empty(longest, *output.shape[1:])
    _reduce_scatter(padded, [_pad(part, longest) for part in input_list], *args, **kwargs)
    output.copy_(padded[: len(output)])
    return None


def _longest(parts: list[Tensor]) -> int | None:
    """Rows of the longest part, or None when all are of one length (or have no rows)."""
    lengths = {len(part) if part.ndim else 0 for part in parts}
    return max(lengths) if len(lengths) > 1 else None


def _pad(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
