"""Lower bounds: no plan can finish a step earlier. Every plan comes with its gap to the bound.

In a step that ends by time T each job (a sequence or a unit) has a degree at which it takes at most
T, so its work is at least that at the smallest such degree. The sum over all jobs must fit in
hdp_size * T rank-seconds; the bound is the smallest T for which it does, to within 0.1%. Terms:

* work      every job at the smallest degree that memory allows, spread over all ranks
* longest   no job ends sooner than at its fastest degree; with pipeline stages it passes all of
            them, forward and backward
* memory    a step has at least tokens / capacity microbatches, and each rank at least one; each
            costs fixed_s, and some rank has at least the average number. Two jobs that each need
            over half of the ranks cannot overlap; likewise three that need over a third, and so on
* counts    if jobs need more than k * hdp_size ranks in total, some rank runs k + 1 of them
* pipeline  a microbatch passes all pp_size stages before the last one can start, and again after it
            is done: fixed_s for each
* reduce    the part of the gradient reduction that no backward can hide (`step_bound_s`)

The bound holds for plans in which a ring serves one job, respects node boundaries, and is gathered
only where costs/gathering.py allows it, and in which host copies are hidden as in memory.py: each
job has the ranks that it needs alone, and no copy hides behind what a ring adds.
"""

from __future__ import annotations

import numpy as np

from hdp.scheduler.policies.memory import least_microbatches

from .degrees import Degrees, Widening

_PRECISION = 1000  # the bound is found to one part in this many
_SOME_JOBS = 4096  # with more jobs, the `counts` term no longer matters


def lower_bound_ticks(degrees: Degrees) -> int:
    """The bound on compute, communication and fixed_s, in ticks."""
    low, ranks, stages = degrees.low, degrees.batch.hdp_size, degrees.batch.pp_size
    some = len(low) <= _SOME_JOBS
    fill = (stages - 1) * degrees.fixed
    bottom = needed_ticks(degrees, low, degrees.low_ticks) + fill
    # Some rank has at least the average number of microbatches.
    count = -(-least_microbatches(degrees.batch) // ranks)
    bottom = max(bottom, count * degrees.fixed + fill)
    bottom = max(bottom, _some_rank_twice(degrees) if some else 0)
    wide = np.flatnonzero((low > 1) | (degrees.low_ticks > bottom // stages))
    if not len(wide):
        return bottom
    widening = Widening(degrees, wide)
    longest = int(widening.best_ticks.max()) * stages
    bottom = max(bottom, longest, _few_at_once(widening, ranks))

    def needed_by(target: int) -> int:
        """Mean load when each job must pass all stages, forward and backward, by `target`."""
        degree, ticks = low.copy(), degrees.low_ticks.copy()
        degree[wide], ticks[wide] = widening.fit(target // stages)
        return needed_ticks(degrees, degree, ticks) + fill

    top = needed_by(bottom)
    while top - bottom > bottom // _PRECISION:
        middle = (bottom + top) // 2
        now = needed_by(middle)
        if now > middle:
            bottom, top = middle, min(top, now)
        else:
            top = middle
    return bottom


def step_bound_s(degrees: Degrees, bound: int) -> float:
    """The bound on the whole step, in seconds: `bound` ticks plus the exposed gradient reduction.

    Without pipeline stages the reduction may start in the backward of the last microbatches. Those
    are at most the whole load of their ranks, so it starts no earlier than `forward_share` of the
    bound.
    """
    cost, bound_s = degrees.batch.cost, bound * degrees.tick_s
    if degrees.batch.pp_size > 1:
        return bound_s + cost.reduce_s
    return max(bound_s, cost.forward_share * bound_s + cost.reduce_s)


def needed_ticks(
    degrees: Degrees, degree: np.ndarray, ticks: np.ndarray, microbatch: int | None = None
) -> int:
    """Mean ticks per rank of all microbatches, rounded up, with each job at its `degree`.

    If `microbatch` is given, local jobs that share a microbatch take at most that many ticks.
    """
    batch = degrees.batch
    count = max(int(degree[degree > 1].sum()), least_microbatches(batch), batch.hdp_size)
    work = int(((ticks - degrees.fixed) * degree).sum())
    if microbatch is not None:
        local = degree == 1
        own = int((ticks[local] - degrees.fixed).sum())
        count = max(count, int(degree[~local].sum()) + own // microbatch)
    return -(-(work + degrees.fixed * count) // batch.hdp_size)


def _few_at_once(widening: Widening, ranks: int) -> int:
    """Ticks for jobs that need so many ranks that only few of them fit at a time."""
    order = np.argsort(-widening.low, kind="stable")
    order = order[widening.low[order] > 1]
    low, node = widening.low[order], widening.node
    at_once = np.where(low <= node, node // low * (ranks // node), ranks // low)
    return int((np.cumsum(widening.best_ticks[order]) // at_once).max(initial=0))


def _some_rank_twice(degrees: Degrees) -> int:
    """If jobs need more than k * hdp_size ranks in total, some rank runs k + 1 of them."""
    ranks, fixed = degrees.batch.hdp_size, degrees.fixed
    widening = Widening(degrees, np.arange(len(degrees.low)))
    order = np.argsort(-widening.best_ticks, kind="stable")
    best, low = widening.best_ticks[order], widening.low[order]
    times = -(-np.cumsum(low) // ranks)
    on_rings = np.logical_and.accumulate(low > 1)  # local jobs may share a microbatch
    return int((times * (best - fixed) + fixed * np.where(on_rings, times, 1)).max())
