"""The digest of the weights: the same however they are cut, another one after the smallest change."""

from __future__ import annotations

import torch

from megatron_t1.models.weight_map import Piece
from megatron_t1.weights.plan import Plan


def fingerprint(tensors: dict[str, torch.Tensor], cuts: int = 1) -> str:
    pieces = []
    for name, tensor in tensors.items():
        for part in torch.arange(tensor.shape[0]).chunk(cuts):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            rest = tuple(slice(0, size) for size in tensor.shape[1:])
            pieces.append(Piece(name=name, shape=tuple(tensor.shape), index=(rows, *rest), view=tensor[rows]))
    return Plan(pieces).fingerprint()


def test_it_does_not_depend_on_the_layout_and_sees_every_change() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"a": torch.randn(8, 3).to(dtype), "b": torch.randn(8, 3).to(dtype)}
        whole = fingerprint(tensors)
        assert fingerprint(tensors, cuts=4) == whole
        assert fingerprint({"a": tensors["b"], "b": tensors["a"]}) != whole
        bits = tensors["a"].view(torch.int32 if dtype is torch.float32 else torch.int16)
        bits[3, 1] += 1  # the last bit of one number
        assert fingerprint(tensors) != whole
