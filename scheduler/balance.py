"""hdp: any degree for each sequence, chosen by work and by memory; near-optimal, in milliseconds.

The objective is the finishing time of the step under the semantics of simulate.py: this is
scheduling of moldable parallel tasks. What makes it tractable is the long tail of short ones.

1. Target: the lower bound (bounds.py) times some head room.
2. Degrees: the least that memory allows, widened until no job takes longer than the target times
   `grain`. Wider rings are more work, so the target rises to what the work now needs.
3. Rings, widest and longest first, go to columns of ranks (columns.py); those for which no column
   is low enough join several columns (joins.py).
4. Local jobs, longest first, go to the least loaded rank, the last ones where they fit (fill.py).
5. On each rank local jobs are packed into microbatches by best fit. They come after the rings, so
   that a rank with local work ends with it (StepPlan.ends_together).
6. Local jobs may ride on rings that have room (riders.py).
7. Steps 1 to 5 are tried with less grain and more head room, with degrees that divide the ranks
   well, and with large local jobs among the rings (they may then widen too), until a plan is close
   to the bound or the tries are used up. The first of the best wins.

With pipeline stages a rank takes, up to a fraction of one microbatch, the sum of its microbatches
and pp_size - 1 times the longest of them, in whatever order they come. So in step 2 the time limit
is that of a microbatch, local jobs share one only up to the limit, and step 7 tries limits around
the one for which mean load plus (pp_size - 1) * limit is least.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .arrange import arrangements
from .attempt import Attempt, Limits, attempt, build
from .bounds import needed_ticks
from .degrees import Degrees, Widening
from .jobs import Batch
from .plan import StepPlan
from .riders import with_riders
from .simulate import finish_s

# (head room, grain, coarse, even): local jobs longer than coarse * target are placed among the
# rings; even degrees are those that divide the ranks well.
_TRIES = (
    (1.0, 1.0, 2.0, False),
    (1.0, 1.0, 2.0, True),
    (1.01, 1.0, 2.0, False),
    (1.0, 1.0, 0.1, False),
    (1.0, 1.0, 0.1, True),
    (1.02, 1.0, 0.1, False),
    (1.05, 1.0, 0.1, False),
    (1.0, 0.5, 0.1, False),
    (1.0, 0.5, 0.1, True),
    (1.02, 0.5, 0.1, False),
    (1.05, 0.5, 0.1, False),
    (1.1, 1.0, 0.1, False),
    (1.0, 0.34, 0.1, False),
    (1.02, 0.34, 0.1, False),
    (1.05, 0.34, 0.1, False),
    (1.0, 0.25, 0.1, False),
    (1.0, 0.25, 0.1, True),
    (1.05, 0.25, 0.1, False),
    (1.1, 0.5, 0.1, False),
    (1.2, 1.0, 0.1, False),
    (1.0, 0.125, 0.1, False),
    (1.05, 0.125, 0.1, True),
    (1.0, 0.0, 0.02, False),
    (1.08, 1.0, 0.1, False),
    (1.06, 1.0, 0.1, False),
    (1.06, 1.0, 0.1, True),
    (1.07, 1.0, 0.1, False),
    (1.04, 1.0, 0.1, False),
    (1.04, 1.0, 0.1, True),
    (1.03, 1.0, 0.1, False),
    (1.3, 1.0, 0.1, False),
    (1.4, 1.0, 0.1, False),
    (1.6, 1.0, 0.1, False),
)


# In batches of so many jobs riders are worth a look only if fixed_s is a part of the step.
_LARGE = 32768

# Pipelines: limits that are tried; the share of the mean load that pipelines may add at the least
# limit; and what the search may cost, in units of about 10 microseconds.
_LIMITS = 5
_LEAST_GAIN = 0.04
_BUDGET = 30_000
_MOST_RINGS = 20_000


def plan_hdp(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """The policy of the module docstring; `bound` is the lower bound in ticks."""
    if batch.pp_size > 1:
        return _plan_pipelines(batch, degrees, bound)
    best: Attempt | None = None
    spent, entries = 0, _entries(degrees)
    for head_room, grain, coarse, even in _TRIES:
        target = int(bound * head_room)
        if best is not None and target >= best.end:
            continue
        limits = Limits(
            target=target,
            degree=max(int(target * grain), 1),
            coarse=int(target * coarse),
            even=even,
            entries=None if best is None else entries,
        )
        made = attempt(degrees, limits)
        if made is None:
            continue
        if best is None or made.end < best.end:
            best = made
        spent += len(made.rings.job) + batch.num_jobs // 16 + int(made.degree.sum()) // 64 + 16
        if best.end <= _close_enough(spent) * bound:
            break
    assert best is not None
    plans = [build(batch, best)]
    if batch.num_jobs < _LARGE or degrees.fixed * 100 > bound:
        plans += [build(batch, made) for made in with_riders(degrees, best)]
    return min(plans, key=lambda plan: finish_s(plan, batch.cost)) if plans[1:] else plans[0]


def _close_enough(spent: int) -> float:
    """Gap at which the search stops: the more it has cost, the sooner."""
    return 1.0005 + spent / 400_000


def _entries(degrees: Degrees) -> int:
    """Plans with more ranks on rings are not worth their size."""
    return 4 * int(degrees.low.sum()) + 64 * degrees.batch.hdp_size


# ---- pipelines ----


def _plan_pipelines(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """Step 7 by simulation: limits, then head room and wider rings, then orders."""
    best: tuple[float, StepPlan, Attempt, Limits] | None = None
    spent, entries = 0, _entries(degrees)

    def consider(made: Attempt | None, limits: Limits) -> None:
        nonlocal best, spent
        if made is None:
            return
        plan = build(batch, made)
        end_s = finish_s(plan, batch.cost)
        slots = batch.pp_size * int(plan.num_microbatches.max())
        spent += len(made.rings.job) + batch.num_jobs // 8 + slots * (8 + batch.hdp_size // 256)
        if best is None or end_s < best[0]:
            best = (end_s, plan, made, limits)

    for limit, mean in _microbatch_limits(degrees, bound):
        limits = Limits(
            target=mean,
            degree=limit,
            coarse=limit,
            microbatch=limit,
            entries=None if best is None else entries,
        )
        if best is None or spent < _BUDGET:
            consider(attempt(degrees, limits), limits)
    assert best is not None
    first = best[3]
    for head_room, wider in ((1.03, 1), (1.1, 1), (1.0, 4), (1.1, 4), (1.0, 32)):
        limits = replace(
            first,
            target=int(first.target * head_room),
            degree=max(first.degree // wider, 1),
            entries=entries,
        )
        if spent < _BUDGET:
            consider(attempt(degrees, limits), limits)
    made, limits = best[2:]
    for ordered in arrangements(made, batch.hdp_size, batch.seconds(made.degree)):
        if spent < _BUDGET:
            consider(ordered, limits)
    for riding in with_riders(degrees, made):
        if spent < _BUDGET:
            consider(riding, limits)
    return best[1]


def _microbatch_limits(degrees: Degrees, bound: int) -> list[tuple[int, int]]:
    """(ticks of a microbatch, mean load then), the most promising first."""
    stages, low = degrees.batch.pp_size, degrees.low
    limit = max(bound // stages, 1)
    promise: list[tuple[int, int, int]] = []
    while True:
        degree, ticks = low.copy(), degrees.low_ticks.copy()
        wide = np.flatnonzero((low > 1) | (ticks > limit))
        if promise and len(wide) > _MOST_RINGS:
            break
        if len(wide):
            degree[wide], ticks[wide] = Widening(degrees, wide).fit(limit)
        mean = needed_ticks(degrees, degree, ticks, limit)
        end = mean + (stages - 1) * max(limit, int(ticks.max()))
        promise.append((end, limit, mean))
        if end > 2 * min(promise)[0] or (stages - 1) * limit < _LEAST_GAIN * mean:
            break
        limit = int(limit * 0.75)
    return [(limit, mean) for _, limit, mean in sorted(promise)[:_LIMITS]]
