"""The digest of the weights: the same however they are cut, another one after the smallest change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_t1.models.weight_map import Piece
from megatron_t1.push.digests import summarize
from megatron_t1.push.layout import Layout
from megatron_t1.weights.plan import Plan
from megatron_t1.weights.sums import word_sum


def pieces_of(tensors: dict[str, torch.Tensor], *cuts: list[int]) -> list[Piece]:
    """Cut before these indices of each dimension."""
    pieces = []
    for name, tensor in tensors.items():
        edges = [[0, *at, size] for at, size in itertools.zip_longest(cuts[: tensor.dim()], tensor.shape, fillvalue=[])]
        for index in itertools.product(*([slice(*pair) for pair in itertools.pairwise(at)] for at in edges)):
            pieces.append(Piece(name=name, shape=tuple(tensor.shape), index=index, view=tensor[index]))
    return pieces


def fingerprint(tensors: dict[str, torch.Tensor], *cuts: list[int]) -> str:
    return Plan(pieces_of(tensors, *cuts)).fingerprint()


def words_of(tensor: torch.Tensor) -> int:
    """NumPy's sum of the rows as 64-bit words, each row filled up with zeros."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous().view(torch.uint8).numpy()
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    return sum(padded.view("<u8").ravel().tolist()) % 2**64


def test_it_does_not_depend_on_the_layout_and_sees_every_change() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"a": torch.randn(8, 3).to(dtype), "b": torch.randn(8, 3).to(dtype)}
        whole = fingerprint(tensors)
        assert fingerprint(tensors, [2, 4, 6]) == whole
        assert fingerprint(tensors, [3], [1]) == whole
        assert fingerprint({"a": tensors["b"], "b": tensors["a"]}) != whole
        bits = tensors["a"].view(torch.int32 if dtype is torch.float32 else torch.int16)
        bits[3, 1] += 1  # the last bit of one number
        assert fingerprint(tensors) != whole


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (64,), (5, 24), (5, 11), (3, 4, 16)])
@pytest.mark.parametrize("cuts", [[[]] * 3, [[2], [1], [4]], [[1], [3], [8]], [[1], [2, 3], [2, 8]]])
def test_a_push_and_a_plan_add_up_the_same_words(dtype: torch.dtype, shape: tuple[int, ...], cuts: list) -> None:
    """Whatever a piece is: rows, columns cut within a word, strided, its dimensions split further."""
    draw = torch.Generator().manual_seed(len(shape))
    tensor = torch.randn(shape, generator=draw).to(dtype)
    plan = Plan(pieces_of({"a": tensor}, *cuts))
    added = [summarize(view, piece).word_sum for view, piece in Layout.of(plan).views(plan)]
    assert sum(added) % 2**64 == words_of(tensor)
    assert added == [word_sum(p.view, [(s.start, s.stop) for s in p.index]) for p in plan.mine()]
    if shape == (64,):
        assert word_sum(tensor.view(4, 16), [(0, 64)]) % 2**64 == words_of(tensor)
    if shape == (3, 4, 16):
        strided = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        assert word_sum(strided, [(0, 3), (0, 4), (0, 16)]) % 2**64 == words_of(tensor)
