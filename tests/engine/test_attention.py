"""The local layers' attention over a packed stream is the textbook's of each sequence, and costs their tokens."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_t1.engine.layers import LocalPackedSeqParams, PackedAttention
from megatron_t1.platform.detect import setup

HEADS, KV_HEADS, WIDTH, SCALE = 6, 2, 8, 0.3


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[n, heads, d], [n, kv_heads, d] twice -> [n, heads * d]."""
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = SCALE * torch.einsum("ihd,jhd->hij", query, key)
    later = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -torch.inf).softmax(-1), value).flatten(1)


@pytest.mark.parametrize(
    "lengths", [[1], [9], [5, 1, 9, 150, 2, 2, 64, 63, 65, 1, 128], [7] * 5, [400, *[2] * 50], [1, 2, 4, 8, 16, 32]]
)
def test_each_sequence_attends_to_itself_whatever_is_packed_beside_it(lengths: list[int]) -> None:
    setup()
    bounds = np.cumsum([0, *lengths]).tolist()
    packed = LocalPackedSeqParams(torch.tensor(bounds, dtype=torch.int32), max(lengths), 0, 1)
    config = SimpleNamespace(context_parallel_size=1, kv_channels=WIDTH)
    attention = PackedAttention(config, 1, None, "self", softmax_scale=SCALE)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    inputs = [
        torch.tensor(rng.normal(size=(bounds[-1], 1, n, WIDTH)), requires_grad=True) for n in (HEADS, *[KV_HEADS] * 2)
    ]
    found = attention(*inputs, None, packed_seq_params=packed)
    expected = torch.cat([textbook(*(x[start:stop, 0] for x in inputs)) for start, stop in pairwise(bounds)])
    torch.testing.assert_close(found[:, 0], expected)
    weights = torch.tensor(rng.normal(size=found.shape))
    gradients = (torch.autograd.grad((out * weights.view_as(out)).sum(), inputs) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sum(index.numel() for index in packed.padded_indices) < 2 * bounds[-1], "short ones beside a long one"
