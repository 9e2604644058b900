"""Packing keeps every token once, within its sequence, and equal shapes over ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_t1.data.packing import pack
from megatron_t1.types import TrainSequence


def make(lengths):
    rng = np.random.default_rng(0)
    return [
        TrainSequence(
            prompt_ids=rng.integers(0, 99, p), response_ids=rng.integers(0, 99, r), advantage=float(i),
            rollout_logprobs=rng.normal(size=r).astype(np.float32),
        )
        for i, (p, r) in enumerate(lengths)
    ]  # fmt: skip


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, dp_size=st.integers(1, 4), multiple=st.sampled_from([1, 2, 8]), limit=st.integers(50, 200))
def test_every_response_token_is_predicted_once(lengths, dp_size, multiple, limit):
    sequences = make(lengths)
    ranks = [pack(sequences, max_tokens=limit, dp_rank=r, dp_size=dp_size, multiple=multiple) for r in range(dp_size)]
    flat = [mb for rank in ranks for mb in rank]
    assert len({len(rank) for rank in ranks}) == 1, "the pipeline schedule needs as many microbatches on every rank"
    assert len({mb.token_ids.numel() for mb in flat}) == 1
    assert flat[0].token_ids.numel() <= limit
    assert flat[0].token_ids.numel() % multiple == 0
    seen: dict[int, list[int]] = {}
    for mb in flat:
        bounds = mb.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == mb.token_ids.numel()
        for start, stop in pairwise(bounds):
            assert mb.position_ids[start:stop].tolist() == list(range(stop - start))
        for position, target, index in zip(
            mb.target_positions.tolist(), mb.targets.tolist(), mb.sample_index.tolist(), strict=True
        ):
            assert mb.token_ids[position + 1] == target, "position p predicts token p + 1"
            assert mb.position_ids[position + 1] == mb.position_ids[position] + 1, "within one sequence"
            seen.setdefault(index, []).append(target)
        for field, value in (("advantage", "advantage"), ("rollout_logprob", "rollout_logprobs")):
            expected = [np.broadcast_to(getattr(sequences[i], value), len(sequences[i].response_ids)) for i in
                        dict.fromkeys(mb.sample_index.tolist())]  # fmt: skip
            np.testing.assert_array_equal(getattr(mb, field), np.concatenate([*expected, []]).astype(np.float32))
    assert seen == {i: s.response_ids.tolist() for i, s in enumerate(sequences)}


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS, size=st.sampled_from([2, 3, 4]), multiple=st.sampled_from([1, 2, 16]), limit=st.integers(48, 99)
)
def test_ranks_that_share_a_sequence_have_every_token_of_it_once_and_equal_work(lengths, size, multiple, limit):
    sequences = make(lengths)
    split = {"max_tokens": limit, "multiple": multiple, "context_size": size}
    ranks = [pack(sequences, context_rank=rank, **split) for rank in range(size)]
    seen: dict[int, list[int]] = {}
    for microbatches in zip(*ranks, strict=True):
        assert len({mb.token_ids.numel() for mb in microbatches}) == 1
        assert microbatches[0].token_ids.numel() % multiple == 0
        assert microbatches[0].token_ids.numel() <= limit
        whole = microbatches[0].cu_seqlens
        assert all(torch.equal(mb.cu_seqlens, whole) for mb in microbatches)
        assert microbatches[0].max_seqlen == whole.diff().max()
        next_token: list[dict[int, int]] = []
        for start, stop in pairwise((whole // size).tolist()):
            positions = [mb.position_ids[start:stop] for mb in microbatches]
            assert sorted(torch.cat(positions).tolist()) == list(range((stop - start) * size))
            assert len({int(part.sum()) for part in positions}) == 1, "what a token attends to is as long as it is late"
            tokens = torch.cat([mb.token_ids[start:stop] for mb in microbatches]).tolist()
            next_token.append({p - 1: token for p, token in zip(torch.cat(positions).tolist(), tokens, strict=True)})
        for mb in microbatches:
            of_sequence = torch.bucketize(mb.target_positions, whole // size, right=True) - 1
            rows = zip(of_sequence, mb.position_ids[mb.target_positions], mb.targets, mb.sample_index, strict=True)
            for number, position, target, index in (map(int, row) for row in rows):
                assert next_token[number][position] == target
                first = len(sequences[index].prompt_ids) - 1
                seen.setdefault(index, []).append(position - first)
                assert sequences[index].response_ids[position - first] == target
            at = [int(p) - len(sequences[i].prompt_ids) + 1 for p, i in
                  zip(mb.position_ids[mb.target_positions], mb.sample_index.tolist(), strict=True)]  # fmt: skip
            expected = [
                sequences[i].rollout_logprobs[place] for i, place in zip(mb.sample_index.tolist(), at, strict=True)
            ]
            assert mb.rollout_logprob.tolist() == expected
    assert {i: sorted(places) for i, places in seen.items()} == {
        i: list(range(len(s.response_ids))) for i, s in enumerate(sequences)
    }


def test_balanced_bins_waste_little():
    sequences = make([(5, n % 37 + 1) for n in range(200)])
    microbatches = pack(sequences, max_tokens=512)
    used = sum(s.num_tokens for s in sequences)
    assert sum(mb.token_ids.numel() for mb in microbatches) <= 1.05 * used


def test_a_sequence_longer_than_a_microbatch_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="a sequence of 40 tokens does not fit into a microbatch of 32"):
        pack(make([(10, 30)]), max_tokens=33, multiple=8)
    with pytest.raises(ValueError, match="a sequence of 40 tokens does not fit into a microbatch of 36 over 2 ranks"):
        pack(make([(10, 30)]), max_tokens=19, context_size=2)
    assert len(pack(make([(10, 30)]), max_tokens=20, context_size=2)) == 1
