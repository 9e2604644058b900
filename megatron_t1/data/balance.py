"""Which sequences share a microbatch, and whose it is: the fewest microbatches, and as much work on every rank.

The pipeline schedule sends one fixed shape, so every microbatch is padded to the fullest one. What the matrices cost is
then the same on all data-parallel ranks; they differ in attention, whose work grows with the square of a sequence's
length. So tokens decide how full a microbatch is, and squares where it goes:

    fill      longest sequence first into the emptiest microbatch; when they don't fit so, into the fullest with room
    deal      heaviest microbatch first to the rank with the least work that still lacks one
    exchange  up to two sequences of the busiest rank for up to two of the idlest, while that lowers the busier's work

All in whole numbers: every rank computes the same. Work here is a sum of squares, padding (one more sequence) included.
"""

from __future__ import annotations

import bisect
import heapq
import itertools

import numpy as np

_EXCHANGES = 200
"""At most: each takes about a millisecond."""
_CLOSE = 1.003
"""Busiest rank by the mean at which no more is exchanged."""
_GAIN = 0.9998
"""Share of the busiest rank's work that must be left or less, for an exchange to be worth its time."""
_CHOICE = 16
"""Sequences of a microbatch that are looked at for an exchange, evenly spread over its lengths."""
_NEVER = np.iinfo(np.int64).max


def assign(lengths: list[int], limit: int, dp_size: int, count_multiple: int = 1) -> list[list[int]]:
    """Indices of the sequences in each microbatch; data-parallel rank r takes every `dp_size`-th from number r on, the
    heaviest first, so that ranks are at like ones at the same time.

    Args:
        limit: tokens that a microbatch holds; no sequence is longer.
        count_multiple: the number of microbatches of a rank is a multiple of it.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    step = dp_size * count_multiple
    tight = _filled_tightly(lengths, order, limit)
    fewest, most = (max(1, -(-count // step)) * step for count in (-(-sum(lengths) // limit), len(tight)))
    counts = range(fewest, most, step)  # with `most` of them it is known that they fit
    at = bisect.bisect_left(counts, True, key=lambda count: bool(_filled_evenly(lengths, order, limit, count)))
    bins = _filled_evenly(lengths, order, limit, counts[at] if at < len(counts) else most)
    bins = bins or [*tight, *([] for _ in range(most - len(tight)))]
    return bins if dp_size == 1 else _balanced(np.array(lengths, np.int64), bins, dp_size)


def _filled_evenly(lengths: list[int], order: list[int], limit: int, num_bins: int) -> list[list[int]] | None:
    """Each into the emptiest bin; None when they do not fit into so many."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, b) for b in range(num_bins)]  # a heap
    for i in order:
        load, b = loads[0]
        if load + lengths[i] > limit:
            return None
        bins[b].append(i)
        heapq.heapreplace(loads, (load + lengths[i], b))
    return bins


def _filled_tightly(lengths: list[int], order: list[int], limit: int) -> list[list[int]]:
    """Each into the fullest bin with room, or a new one."""
    bins: list[list[int]] = []
    loads: list[tuple[int, int]] = []  # sorted
    for i in order:
        at = bisect.bisect_right(loads, (limit - lengths[i], len(bins))) - 1
        load, b = loads.pop(at) if at >= 0 else (0, len(bins))
        if b == len(bins):
            bins.append([])
        bins[b].append(i)
        bisect.insort(loads, (load + lengths[i], b))
    return bins


def _balanced(lengths: np.ndarray, bins: list[list[int]], dp_size: int) -> list[list[int]]:
    size = max(int(lengths[members].sum()) for members in bins)

    def work(members: list[int]) -> int:
        return int((lengths[members] ** 2).sum() + (size - lengths[members].sum()) ** 2)

    works = [work(members) for members in bins]
    ranks = _deal(works, dp_size)
    loads = [sum(works[b] for b in rank) for rank in ranks]
    for _ in range(_EXCHANGES):
        busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
        if loads[busiest] * dp_size <= _CLOSE * sum(loads):
            break
        heavy = sorted((b for b in ranks[busiest] if len(bins[b]) > 1), key=lambda b: -works[b])[:2]
        light = sorted(ranks[idlest], key=lambda b: works[b])[:2]
        found = [
            (*_exchange(lengths, size, bins[b], bins[e], loads[busiest] - works[b], loads[idlest] - works[e]), b, e)
            for b, e in itertools.product(heavy, light)
        ]
        worst, give, take, b, e = min(found, default=(_NEVER, [], [], 0, 0))
        if worst > _GAIN * loads[busiest]:
            break
        bins[b] = [*(i for i in bins[b] if i not in give), *take]
        bins[e] = [*(i for i in bins[e] if i not in take), *give]
        for rank, changed in ((busiest, b), (idlest, e)):
            loads[rank] -= works[changed]
            works[changed] = work(bins[changed])
            loads[rank] += works[changed]
    by_rank = [sorted(rank, key=lambda b: (-works[b], b)) for rank in ranks]
    return [bins[b] for at_once in zip(*by_rank, strict=True) for b in at_once]


def _deal(works: list[int], dp_size: int) -> list[list[int]]:
    """Numbers of the bins of each rank, as many of each."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    heap = [(0, rank) for rank in range(dp_size)]
    for b in sorted(range(len(works)), key=lambda b: (-works[b], b)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(b)
        if len(ranks[rank]) < len(works) // dp_size:
            heapq.heappush(heap, (load + works[b], rank))
    return ranks


def _exchange(
    lengths: np.ndarray, size: int, mine: list[int], yours: list[int], my_rest: int, your_rest: int
) -> tuple[int, list[int], list[int]]:
    """The best exchange between two bins: the work of the busier rank after it, what is given and what is taken.

    Args:
        my_rest, your_rest: work of the two ranks without these bins.
    """
    (give, my_tokens, my_squares), (take, your_tokens, your_squares) = _choices(lengths, mine), _choices(lengths, yours)
    tokens, squares = my_tokens[:, None] - your_tokens, my_squares[:, None] - your_squares
    my_room = size - lengths[mine].sum() + tokens
    your_room = size - lengths[yours].sum() - tokens
    worst = np.maximum(
        my_rest + (lengths[mine] ** 2).sum() - squares + my_room**2,
        your_rest + (lengths[yours] ** 2).sum() + squares + your_room**2,
    )
    worst[(my_room < 0) | (your_room < 0)] = _NEVER
    best = int(worst.argmin())
    row, column = divmod(best, len(take))
    return (
        int(worst.flat[best]),
        [i for i in give[row].tolist() if i >= 0],
        [i for i in take[column].tolist() if i >= 0],
    )


def _choices(lengths: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """None, each and every two of a bin's sequences: their indices [n, 2] (-1: none), tokens [n], squares [n]."""
    some = sorted(members, key=lambda i: (-lengths[i], i))[:: -(-len(members) // _CHOICE) or 1]
    chosen = np.array([-1, -1, *some])[np.stack(np.triu_indices(len(some) + 2, 1), axis=1)]
    of_each = np.where(chosen < 0, 0, lengths[chosen])
    return chosen, of_each.sum(axis=1), (of_each**2).sum(axis=1)
