"""Orders of microbatches: same microbatches, same ranks, other indices.

Without pipelines a plan may be turned around: then its widest rings end it, on all of their ranks,
which lets the reduction of gradients start during their backward.

A pipeline loses least when its microbatches rise and then fall in time. Rings keep one index on all
of their ranks, so all rings move together: they are delayed by some indices, or turned around, and
on every rank local microbatches fill the indices that its rings leave, small ones rising before the
last ring and the others falling after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .list_schedule import Attempt

_DELAYS = (0, 1, 2, 4, 8)


def turned(made: Attempt) -> Attempt:
    """The last microbatch of every rank first, for plans without pipeline stages."""
    last = max(int(made.rings.index.max(initial=0)), int(made.index.max(initial=0)))
    rings = replace(made.rings, index=last - made.rings.index)
    return replace(made, rings=rings, index=last - made.index)


def arrangements(made: Attempt, num_ranks: int, seconds: np.ndarray) -> Iterator[Attempt]:
    """Attempts that differ from this one in indices only; seconds: (num_jobs,) of each job."""
    depth = int(made.rings.index.max(initial=-1)) + 1
    most_local = 0
    if len(made.local):
        most_local = int((made.index - made.first_free[made.rank]).max()) + 1
    turned = replace(made.rings, index=depth - 1 - made.rings.index)
    for rings in (made.rings, turned) if depth > 1 else (made.rings,):
        for delay in _DELAYS if depth else (0,):
            if delay <= most_local // 2:
                later = replace(rings, index=rings.index + delay)
                yield _filled(replace(made, rings=later), num_ranks, seconds)


def _filled(made: Attempt, num_ranks: int, seconds: np.ndarray) -> Attempt:
    """Local microbatches in the indices that rings leave on each rank."""
    if not len(made.local):
        return made
    # Local microbatches as (rank, number on it), with their seconds, rising on each rank.
    bins = made.index - made.first_free[made.rank]
    width = int(bins.max()) + 1
    key = made.rank * width + bins
    names, inverse = np.unique(key, return_inverse=True)
    own = np.bincount(inverse, weights=seconds[made.local])
    rank = names // width
    order = np.lexsort((names, own, rank))
    count = np.bincount(rank, minlength=num_ranks)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names)) - (np.cumsum(count) - count)[rank[order]]
    # Indices below the last ring that no ring uses, on each rank.
    on, index = made.rings.by_rank(made.rings.index)
    last = np.zeros(num_ranks, dtype=np.int64)
    np.maximum.at(last, on, index + 1)
    length = int(last.max(initial=0))
    used = np.zeros((num_ranks, max(length, 1)), dtype=bool)
    used[on, index] = True
    free = ~used & (np.arange(max(length, 1)) < last[:, None])
    gaps = free.sum(axis=1)
    slots = np.argsort(~free, axis=1, kind="stable")  # free indices first, rising
    # Small ones rise through the gaps, the others fall after the last ring.
    mine_gaps, mine_count = gaps[rank], count[rank]
    in_gap = place < mine_gaps
    at = last[rank] + (mine_count - 1 - place)
    at[in_gap] = slots[rank[in_gap], place[in_gap]]
    return replace(made, index=at[inverse])
