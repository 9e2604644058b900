"""Whole sequences into microbatches: no padding inside, equal length over ranks and microbatches.

`balance.py` says which sequences share a microbatch; each is padded to the fullest one, because the pipeline schedule
sends one fixed shape. The plan depends on the sequences and the layout alone, so every rank computes the same one and
takes its share: of the microbatches, and under context parallelism of every sequence in them (`rows_of`). Masked tokens
(prompts, padding) are not targets: they never reach the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from megatron_t1.data.balance import assign
from megatron_t1.types import Group, Microbatch, TrainSequence


def sequences_of(groups: list[Group]) -> list[TrainSequence]:
    """The step's samples in a flat list; `Microbatch.sample_index` counts along it."""
    return [
        TrainSequence(
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.token_ids,
            advantage=sample.advantage,
            rollout_logprobs=sample.logprobs,
            group=number,
        )
        for number, group in enumerate(groups)
        for sample in group.samples
    ]


def pack(
    sequences: list[TrainSequence],
    *,
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    multiple: int = 1,
    count_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """This data-parallel rank's microbatches: as many on every rank, each of the same number of tokens.

    Args:
        max_tokens: the most tokens in a microbatch of one rank, padding included.
        context_rank, context_size: of the ranks that share every sequence. Each is padded so that it can be cut.
        multiple: the length of a microbatch is a multiple of it (TP size under sequence parallelism; more for FP8).
        count_multiple: so is the number of them of it (pipeline size under the interleaved schedule).

    Raises:
        ValueError: a sequence longer than max_tokens x context_size.
    """
    chunks = 2 * context_size if context_size > 1 else 1
    multiple = math.lcm(multiple * context_size, chunks)
    limit = max_tokens * context_size // multiple * multiple
    longest = max((s.num_tokens for s in sequences), default=0)
    if longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit into a microbatch of {limit}"
            f"{f' over {context_size} ranks' if context_size > 1 else ''}; raise max_tokens_per_microbatch"
        )
    lengths = [-(-s.num_tokens // chunks) * chunks for s in sequences]
    bins = assign(lengths, limit, dp_size, count_multiple)
    fullest = max(sum(lengths[i] for i in members) for members in bins)
    num_tokens = max(multiple, -(-fullest // multiple) * multiple)
    return [
        _pack_one(sequences, members, lengths, num_tokens, context_rank, context_size, device)
        for members in bins[dp_rank::dp_size]
    ]


def rows_of(rank: int, size: int, bounds: Sequence[int]) -> np.ndarray:
    """Where in the packed stream the tokens are that a rank of a context group has: int64 [s], ascending.

    Every sequence is cut into 2 x size equal chunks, of which the rank has number `rank` from the beginning and from
    the end: causal attention is then as much work on every rank. The split is Transformer Engine's.

    Args:
        bounds: of the sequences in the stream, each a multiple of 2 x size.
    """
    if size == 1:
        return np.arange(bounds[-1])
    chunks = [np.arange(start, stop).reshape(2 * size, -1) for start, stop in pairwise(bounds)]
    return np.concatenate([part for of in chunks for part in (of[rank], of[-1 - rank])])


def _pack_one(
    sequences: list[TrainSequence],
    members: list[int],
    lengths: list[int],
    num_tokens: int,
    context_rank: int,
    context_size: int,
    device: torch.device | str,
) -> Microbatch:
    """
    Args:
        lengths: of the sequences, padded.
        num_tokens: of the whole stream, over all ranks of the context group.
    """
    token_ids = np.zeros(num_tokens, np.int64)
    position_ids = np.zeros(num_tokens, np.int64)
    bounds = [0]
    positions, targets, advantage, rollout, index = [], [], [], [], []
    for i in members:
        s = sequences[i]
        start, num_prompt, num_response = bounds[-1], len(s.prompt_ids), len(s.response_ids)
        stop = start + s.num_tokens
        token_ids[start : start + num_prompt] = s.prompt_ids
        token_ids[start + num_prompt : stop] = s.response_ids
        position_ids[start : start + lengths[i]] = np.arange(lengths[i])
        positions.append(np.arange(start + num_prompt - 1, stop - 1))
        targets.append(s.response_ids)
        advantage.append(np.full(num_response, s.advantage, np.float32))
        rollout.append(np.zeros(num_response, np.float32) if s.rollout_logprobs is None else s.rollout_logprobs)
        index.append(np.full(num_response, i, np.int64))
        bounds.append(start + lengths[i])
    if bounds[-1] < num_tokens:
        position_ids[bounds[-1] :] = np.arange(num_tokens - bounds[-1])
        bounds.append(num_tokens)
    rows = rows_of(context_rank, context_size, bounds)
    place = np.full(num_tokens, -1)  # on this rank
    place[rows] = np.arange(len(rows))
    local = place[np.concatenate([*positions, np.zeros(0, np.int64)])]
    here = local >= 0

    def tensor(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)[here]).to(device)

    zeros = torch.zeros(here.sum(), device=device)
    return Microbatch(
        token_ids=torch.from_numpy(token_ids[rows]).to(device),
        position_ids=torch.from_numpy(position_ids[rows]).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=int(np.diff(bounds).max()),
        target_positions=torch.from_numpy(local[here]).to(device),
        targets=tensor(targets, np.int64),
        advantage=tensor(advantage, np.float32),
        centered_kl=zeros,
        rollout_logprob=tensor(rollout, np.float32),
        anchor_logprob=zeros,
        sequence_log_ratio=zeros,
        geometric_log_ratio=zeros,
        sample_index=tensor(index, np.int64),
    )
