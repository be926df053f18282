"""LPT (longest processing time first): the rank of every local job. Columnar.

Times are integer ticks, so that sums do not depend on the order or the machine.
"""

from __future__ import annotations

import heapq

import numpy as np

from hdp.scheduler.policies.packing import best_fit

# When a round of longest_first places fewer jobs than this, a heap places the next _HEAP_RUN.
_FEW = 24
_HEAP_RUN = 512
# Best fit may exceed the mean load by one part in this many.
_SLACK = 4096


def longest_first(load: np.ndarray, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LPT on top of existing loads: each job, longest first, goes to the least loaded rank.

    load: (num_ranks,) int64, ticks; ticks: (num_jobs,) int64, descending. Returns the rank of each
    job (num_jobs,) int64 and the new loads. Jobs are placed in rounds: the k least loaded ranks
    take one job each, for the largest k for which plain LPT would do the same.
    """
    load = load.copy()
    ranks = np.empty(len(ticks), dtype=np.int64)
    at = 0
    while at < len(ticks):
        order = np.argsort(load, kind="stable")[: len(ticks) - at]
        low, sizes = load[order], ticks[at : at + len(order)]
        ends = low + sizes
        # Job k goes to a fresh rank as long as none that got a job this round is less loaded.
        late = low[1:] > np.minimum.accumulate(ends[:-1])
        count = int(np.argmax(late)) + 1 if late.any() else len(order)
        if count < _FEW < len(ticks) - at:
            stop = min(at + _HEAP_RUN, len(ticks))
            _by_heap(load, ticks, ranks, at, stop)
            at = stop
            continue
        load[order[:count]] = ends[:count]
        ranks[at : at + count] = order[:count]
        at += count
    return ranks, load


def _by_heap(load: np.ndarray, ticks: np.ndarray, ranks: np.ndarray, at: int, stop: int) -> None:
    """Plain LPT for jobs [at, stop), in place."""
    # So few jobs can only reach the least loaded ranks.
    order = np.argsort(load, kind="stable")[: stop - at]
    heap = list(zip(load[order].tolist(), order.tolist(), strict=True))  # sorted is a heap
    chosen = []
    for size in ticks[at:stop].tolist():
        low, rank = heap[0]
        heapq.heapreplace(heap, (low + size, rank))
        chosen.append(rank)
    ranks[at:stop] = chosen
    for end, rank in heap:
        load[rank] = end


def fill(load: np.ndarray, ticks: np.ndarray) -> np.ndarray:
    """(num_jobs,) int64: the rank of each local job; arguments as in longest_first.

    LPT leaves imbalances of about the smallest jobs. If the fullest rank is above the mean, the
    last two jobs per rank are placed by best fit instead, up to slightly above the mean, provided
    that all of them fit.
    """
    ranks, ends = longest_first(load, ticks)
    num_ranks = len(load)
    goal = max((int(load.sum()) + int(ticks.sum())) // num_ranks, int(load.max()))
    goal += goal // _SLACK
    if int(ends.max()) <= goal:
        return ranks
    first = max(len(ticks) - 2 * num_ranks, 0)
    head, low = longest_first(load, ticks[:first])
    tail = best_fit(ticks[first:], goal, (goal - low).tolist())
    return np.concatenate([head, tail]) if tail.max() < num_ranks else ranks
