"""Packing keeps every token once, within its sequence, and equal shapes over ranks."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_t1.data.balance import assign
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


def work_of_ranks(lengths, bins, dp_size):
    """Squares of all sequences of each rank, padding included."""
    lengths = np.array(lengths, np.int64)
    tokens = [int(lengths[members].sum()) for members in bins]
    squares = [
        int((lengths[members] ** 2).sum()) + (max(tokens) - t) ** 2 for members, t in zip(bins, tokens, strict=True)
    ]
    return [sum(squares[rank::dp_size]) for rank in range(dp_size)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    dp_size=st.integers(1, 4), multiple=st.integers(1, 3), limit=st.integers(100, 300),
)  # fmt: skip
def test_every_sequence_is_in_one_microbatch(lengths, dp_size, multiple, limit):
    bins = assign(lengths, limit, dp_size, multiple)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in members) for members in bins) <= limit
    assert len(bins) % (dp_size * multiple) == 0


DISTRIBUTIONS = {
    "log-normal": lambda rng: rng.lognormal(np.log(4000), 1.0, 1024).clip(100, 32_768),
    "bimodal": lambda rng: np.r_[rng.normal(30_000, 1500, 200), rng.normal(2000, 500, 824)],
    "one giant": lambda rng: np.r_[131_072, rng.lognormal(np.log(6000), 1.0, 4095).clip(100, 60_000)],
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dp_size", [2, 8])
def test_ranks_have_equal_work_where_they_can(name, dp_size):
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0)).clip(100).astype(int).tolist()
    limit = max(lengths) + 2048
    bins = assign(lengths, limit, dp_size)
    work = work_of_ranks(lengths, bins, dp_size)
    assert max(work) <= 1.05 * np.mean(work)


def test_one_long_sequence_is_worth_many_short_ones():
    """Two ranks of two microbatches of 100 tokens: by tokens alone any half would do."""
    lengths = [100, *[50] * 4, *[25] * 4]
    bins = assign(lengths, 100, 2)
    assert work_of_ranks(lengths, bins, 2) == [10_000 + 4 * 625, 4 * 2500]
    assert [sorted(lengths[i] for i in members) for members in bins] == [[100], [50, 50], [25] * 4, [50, 50]]


def test_what_fits_tightly_needs_no_further_microbatch():
    assert len(assign([60, 50, 40, 30, 20], 100, 2)) == 2  # each into the emptier one, the 20 finds no room


def test_sequences_that_fill_half_of_a_microbatch_are_dealt_at_once():
    """Were one microbatch more tried at a time, an hour would pass."""
    assert len(assign([8193] * 20_000, 16_384, 1)) == 20_000
