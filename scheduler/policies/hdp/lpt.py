"""Filling ranks with local jobs: who gets which, and what shares a microbatch. Columnar.

Times are integer ticks, so that sums do not depend on the order or the machine.
"""

from __future__ import annotations

import heapq

import numpy as np

from hdp.scheduler.policies.packing import best_fit

# Rounds of longest_first that place fewer jobs than this go through a heap instead.
_FEW = 24
_HEAP_RUN = 512
# Best fit aims at the mean load and this part of it.
_SLACK = 4096


def longest_first(load: np.ndarray, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longest job to the least loaded rank, again and again (LPT), on top of what ranks have.

    load: (num_ranks,) int64, ticks; ticks: (num_jobs,) int64, falling. Returns the rank of each
    job (num_jobs,) int64 and the new loads. Jobs are placed in rounds: the k least loaded ranks
    take one job each, with the largest k for which plain LPT would have done the same.
    """
    load = load.copy()
    ranks = np.empty(len(ticks), dtype=np.int64)
    at = 0
    while at < len(ticks):
        order = np.argsort(load, kind="stable")[: len(ticks) - at]
        low, sizes = load[order], ticks[at : at + len(order)]
        ends = low + sizes
        # Job k goes to a fresh rank while that is not fuller than any that got a job this round.
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
    # Only the least loaded ranks can be reached by so few jobs.
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

    LPT leaves differences of the order of the smallest jobs. Where the fullest rank is above the
    mean, the last two jobs per rank go by best fit instead, below the mean and a little, if all of
    them fit.
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
