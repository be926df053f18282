"""Reordering: the same microbatches on the same ranks, at other indices.

Without pipelines a schedule may be reversed. It then ends with its widest rings, on all of their
ranks, which lets the gradient reduction start during their backward.

A pipeline has the smallest bubbles when microbatch times rise and then fall. A ring needs one index
on all of its ranks, so all rings move together: they are delayed by some indices or reversed. On
every rank local microbatches fill the free indices, short ones in rising order before the last ring
and the others in falling order after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .list_schedule import Schedule

_DELAYS = (0, 1, 2, 4, 8)


def reversed_order(schedule: Schedule) -> Schedule:
    """Reverse the microbatches of every rank; for plans without pipeline stages."""
    last = max(int(schedule.rings.index.max(initial=0)), int(schedule.index.max(initial=0)))
    rings = replace(schedule.rings, index=last - schedule.rings.index)
    return replace(schedule, rings=rings, index=last - schedule.index)


def pipeline_orders(schedule: Schedule, num_ranks: int, seconds: np.ndarray) -> Iterator[Schedule]:
    """Yield variants that differ from this schedule in indices only; seconds: (num_jobs,)."""
    depth = int(schedule.rings.index.max(initial=-1)) + 1
    most_local = 0
    if len(schedule.local):
        most_local = int((schedule.index - schedule.first_free[schedule.rank]).max()) + 1
    backward = replace(schedule.rings, index=depth - 1 - schedule.rings.index)
    for rings in (schedule.rings, backward) if depth > 1 else (schedule.rings,):
        for delay in _DELAYS if depth else (0,):
            if delay <= most_local // 2:
                later = replace(rings, index=rings.index + delay)
                yield _filled(replace(schedule, rings=later), num_ranks, seconds)


def _filled(schedule: Schedule, num_ranks: int, seconds: np.ndarray) -> Schedule:
    """Put local microbatches at the indices that rings leave free on each rank."""
    if not len(schedule.local):
        return schedule
    # Local microbatches as (rank, number on it), with their seconds, rising on each rank.
    bins = schedule.index - schedule.first_free[schedule.rank]
    width = int(bins.max()) + 1
    key = schedule.rank * width + bins
    names, inverse = np.unique(key, return_inverse=True)
    own = np.bincount(inverse, weights=seconds[schedule.local])
    rank = names // width
    order = np.lexsort((names, own, rank))
    count = np.bincount(rank, minlength=num_ranks)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names)) - (np.cumsum(count) - count)[rank[order]]
    # Free indices before the last ring of each rank.
    on, index = schedule.rings.by_rank(schedule.rings.index)
    last = np.zeros(num_ranks, dtype=np.int64)
    np.maximum.at(last, on, index + 1)
    length = int(last.max(initial=0))
    used = np.zeros((num_ranks, max(length, 1)), dtype=bool)
    used[on, index] = True
    free = ~used & (np.arange(max(length, 1)) < last[:, None])
    gaps = free.sum(axis=1)
    slots = np.argsort(~free, axis=1, kind="stable")  # free indices first, rising
    # Short ones rise through the gaps, the others fall after the last ring.
    mine_gaps, mine_count = gaps[rank], count[rank]
    in_gap = place < mine_gaps
    at = last[rank] + (mine_count - 1 - place)
    at[in_gap] = slots[rank[in_gap], place[in_gap]]
    return replace(schedule, index=at[inverse])
