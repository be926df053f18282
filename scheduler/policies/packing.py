"""Best-fit decreasing: bin packing of jobs into microbatches by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

# If any rank has more jobs than this, ranks are packed one at a time.
_MANY = 256


def best_fit(sizes: np.ndarray, capacity: int, opened: Sequence[int] = ()) -> np.ndarray:
    """(n,) int64: the bin of each item. Largest first, into the fullest bin that has room.

    Bins [0, len(opened)) already exist, with the given room; new ones are numbered as they are
    opened. Every size must be in [1, capacity].
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    room = sorted((left, b) for b, left in enumerate(opened))  # (room left, bin)
    num_bins = len(room)
    values = sizes.tolist()
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = values[item]
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, b = room.pop(at)
        else:
            left, b = capacity, num_bins
            num_bins += 1
        bins[item] = b
        if left > size:
            insort(room, (left - size, b))
    return bins


def best_fit_by_rank(
    ranks: np.ndarray,
    sizes: np.ndarray,
    capacity: int,
    num_ranks: int,
    opened: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing on each rank separately, vectorized over ranks.

    ranks, sizes: (num_jobs,) int64 rank and size of each job, every size in [1, capacity]; opened:
    (num_ranks, num_opened) int64 room of bins that already exist. Returns the bin of each job on
    its rank (num_jobs,) int64, numbered with the opened ones first, then new ones as they are
    opened; and the number of new bins of each rank (num_ranks,) int64.
    """
    if opened is None:
        opened = np.empty((num_ranks, 0), dtype=np.int64)
    num_opened = opened.shape[1]
    bins = np.zeros(len(sizes), dtype=np.int64)
    num_bins = np.zeros(num_ranks, dtype=np.int64)
    if not len(sizes):
        return bins, num_bins
    order = np.lexsort((-sizes, ranks))
    count = np.bincount(ranks, minlength=num_ranks)
    if int(count.max()) > _MANY:
        for rank, jobs in enumerate(np.split(order, np.cumsum(count)[:-1])):
            bins[jobs] = best_fit(sizes[jobs], capacity, opened[rank].tolist())
        np.maximum.at(num_bins, ranks, bins + 1 - num_opened)
        return bins, num_bins
    first = np.cumsum(count) - count
    busiest = np.argsort(-count, kind="stable")
    falling = count[busiest]
    # Rows are in `busiest` order.
    room = np.concatenate(
        [opened[busiest], np.full((num_ranks, 4), capacity, dtype=np.int64)], axis=1
    )
    for k in range(int(falling[0])):
        active = int(np.searchsorted(-falling, -k, side="left"))  # ranks with more than k jobs
        jobs = order[first[busiest[:active]] + k]
        size = sizes[jobs]
        left = room[:active] - size[:, None]
        chosen = np.argmin(np.where(left >= 0, left, capacity + 1), axis=1)
        rows = np.arange(active)
        if bool((left[rows, chosen] < 0).any()):  # some rank is out of bins: add more
            more = np.full((num_ranks, room.shape[1]), capacity, dtype=np.int64)
            room = np.concatenate([room, more], axis=1)
            left = room[:active] - size[:, None]
            chosen = np.argmin(np.where(left >= 0, left, capacity + 1), axis=1)
        room[rows, chosen] = left[rows, chosen]
        bins[jobs] = chosen
    num_bins[busiest] = (room[:, num_opened:] < capacity).sum(axis=1)
    return bins, num_bins
