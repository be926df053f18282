"""Lower bounds: no plan can finish a step earlier. The gap to them comes with every plan.

A step that ends by time T gives each job (a sequence, or a unit) a degree with which it takes at
most T, hence at least the work of the fewest such ranks; the sum over all jobs must fit
hdp_size * T rank-seconds. The bound is the smallest T, up to 0.1 %, for which it does. It contains

* work     every job at the least degree that memory allows, over all ranks
* longest  no job ends before its best degree does; with pipeline stages it passes all of them,
           forward and backward
* memory   a step has at least tokens / capacity microbatches, and each rank at least one; each
           costs fixed_s, and some rank has no less than the average. Of jobs that need more than
           half of the ranks no two run at once, of those that need more than a third no three..
* numbers  jobs that need more than k * hdp_size ranks together meet on some rank k + 1 times
* pipeline a microbatch passes all pp_size stages before the last one can start, and again after it
           is done: fixed_s for each
* reduce   what of the reduction of gradients no backward can hide (`step_bound_s`)

It is a bound for plans in which a ring is one job's, keeps to its nodes and is gathered only where
costs/gathering.py allows it, and host copies are hidden as memory.py has it: each job has the ranks
that it needs alone, and nothing that a ring adds is counted on.
"""

from __future__ import annotations

import numpy as np

from hdp.scheduler.policies.memory import least_microbatches

from .degrees import Degrees, Widening

_PRECISION = 1000  # the bound is found up to one part of this
_SOME_JOBS = 4096  # with more jobs, how they divide by the ranks does not matter


def lower_bound_ticks(degrees: Degrees) -> int:
    """The bound on compute, communication and fixed_s, in ticks."""
    low, ranks, stages = degrees.low, degrees.batch.hdp_size, degrees.batch.pp_size
    some = len(low) <= _SOME_JOBS
    fill = (stages - 1) * degrees.fixed
    bottom = needed_ticks(degrees, low, degrees.low_ticks) + fill
    # Some rank has no less than the average number of microbatches.
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
    """The bound on the whole step, in seconds: `bound` ticks, and the reduction of gradients.

    Without pipeline stages the reduction may begin in the backward of the last microbatches, which
    are at most the whole load of their ranks: not before `forward_share` of the bound.
    """
    cost, bound_s = degrees.batch.cost, bound * degrees.tick_s
    if degrees.batch.pp_size > 1:
        return bound_s + cost.reduce_s
    return max(bound_s, cost.forward_share * bound_s + cost.reduce_s)


def needed_ticks(
    degrees: Degrees, degree: np.ndarray, ticks: np.ndarray, microbatch: int | None = None
) -> int:
    """Rank-ticks of all microbatches over the ranks, rounded up, with jobs on so many ranks.

    Local jobs that share a microbatch take at most `microbatch` ticks together, if given.
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
    """Jobs that need many ranks run one after the other, or few at once."""
    order = np.argsort(-widening.low, kind="stable")
    order = order[widening.low[order] > 1]
    low, node = widening.low[order], widening.node
    at_once = np.where(low <= node, node // low * (ranks // node), ranks // low)
    return int((np.cumsum(widening.best_ticks[order]) // at_once).max(initial=0))


def _some_rank_twice(degrees: Degrees) -> int:
    """Jobs with more than k * hdp_size ranks in all: some rank has k + 1 of them."""
    ranks, fixed = degrees.batch.hdp_size, degrees.fixed
    widening = Widening(degrees, np.arange(len(degrees.low)))
    order = np.argsort(-widening.best_ticks, kind="stable")
    best, low = widening.best_ticks[order], widening.low[order]
    times = -(-np.cumsum(low) // ranks)
    on_rings = np.logical_and.accumulate(low > 1)  # local ones may share a microbatch
    return int((times * (best - fixed) + fixed * np.where(on_rings, times, 1)).max())
