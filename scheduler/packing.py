"""Best-fit packing of tokens into microbatches."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """(n,) int64: the bin of each item. Longest first, into the fullest bin that has room.

    Bins are numbered in the order of their opening. Every size must be <= capacity.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    num_bins = 0
    lengths = sizes.tolist()
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = lengths[item]
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
