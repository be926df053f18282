"""Best-fit packing of tokens into microbatches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit(sizes: np.ndarray, capacity: int, opened: Sequence[int] = ()) -> np.ndarray:
    """(n,) int64: the bin of each item. Longest first, into the fullest bin that has room.

    Bins [0, len(opened)) exist, with that much room; new ones are numbered in the order of their
    opening. Every size must be in [1, capacity].
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
