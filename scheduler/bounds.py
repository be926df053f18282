"""Lower bounds: no plan can finish a step earlier. The gap to them comes with every plan.

A step that ends by time T gives each job (a sequence, or a unit) a degree with which it takes at
most T, hence at least the work of the fewest such ranks; the sum over all jobs must fit
hdp_size * T rank-seconds. The bound is the smallest T, up to 0.1 %, for which it does. It contains

* work     every job at the least degree that memory allows, over all ranks
* longest  no job ends before its best degree does
* memory   a step has at least tokens / capacity microbatches, and each rank at least one; each
           costs fixed_s, and some rank has no less than the average. Of jobs that need more than
           half of the ranks no two run at once, of those that need more than a third no three, ..
* numbers  jobs that need more than k * hdp_size ranks together meet on some rank k + 1 times
* pipeline a microbatch passes all pp_size stages before the last one can start, and again after it
           is done: fixed_s for each

It is a bound for plans in which a ring is one job's and host copies are hidden.
"""

from __future__ import annotations

import math

import numpy as np

from .degrees import Degrees, Widening
from .memory import least_microbatches

_PRECISION = 1000  # the bound is found up to one part of this
_SOME_JOBS = 4096  # with more jobs, how they divide by the ranks does not matter


def lower_bound_s(degrees: Degrees, ticks: int) -> float:
    """Seconds below which no valid plan can finish; `ticks` of lower_bound_ticks."""
    batch = degrees.batch
    return ticks * degrees.tick_s + (batch.pp_size - 1) * batch.cost.fixed_s


def lower_bound_ticks(degrees: Degrees) -> int:
    """The bound on compute, communication and fixed_s of one pipeline stage, in ticks."""
    low, ranks = degrees.low, degrees.batch.hdp_size
    microbatches = least_microbatches(degrees.batch)

    def needed(degree: np.ndarray, ticks: np.ndarray) -> int:
        """Rank-ticks of all microbatches over the ranks, rounded up."""
        count = max(int(degree[degree > 1].sum()), microbatches, ranks)
        work = int(((ticks - degrees.fixed) * degree).sum()) + degrees.fixed * count
        return -(-work // ranks)

    bottom = needed(low, degrees.low_ticks)
    bottom = max(bottom, math.ceil(microbatches / ranks) * degrees.fixed)
    wide = np.flatnonzero((low > 1) | (degrees.low_ticks > bottom))
    if not len(wide):
        return max(bottom, _some_rank_twice(degrees)) if len(low) <= _SOME_JOBS else bottom
    widening = Widening(degrees, wide)
    bottom = max(bottom, int(widening.best_ticks.max()), _few_at_once(widening, ranks))
    if len(low) <= _SOME_JOBS:
        bottom = max(bottom, _some_rank_twice(degrees))

    def needed_by(target: int) -> int:
        """The same when each job must end by `target`."""
        degree, ticks = low.copy(), degrees.low_ticks.copy()
        degree[wide], ticks[wide] = widening.fit(target)
        return needed(degree, ticks)

    top = needed_by(bottom)
    while top - bottom > bottom // _PRECISION:
        middle = (bottom + top) // 2
        now = needed_by(middle)
        if now > middle:
            bottom, top = middle, min(top, now)
        else:
            top = middle
    return bottom


def _few_at_once(widening: Widening, ranks: int) -> int:
    """Jobs that need many ranks run one after the other, or few at once."""
    order = np.argsort(-widening.low, kind="stable")
    at_once = ranks // widening.low[order]
    return int((np.cumsum(widening.best_ticks[order]) // at_once).max())


def _some_rank_twice(degrees: Degrees) -> int:
    """Jobs with more than k * hdp_size ranks in all: some rank has k + 1 of them."""
    ranks, fixed = degrees.batch.hdp_size, degrees.fixed
    widening = Widening(degrees, np.arange(len(degrees.low)))
    order = np.argsort(-widening.best_ticks, kind="stable")
    best, low = widening.best_ticks[order], widening.low[order]
    times = -(-np.cumsum(low) // ranks)
    on_rings = np.logical_and.accumulate(low > 1)  # local ones may share a microbatch
    return int((times * (best - fixed) + fixed * np.where(on_rings, times, 1)).max())
