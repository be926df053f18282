"""hdp: any degree for each sequence, chosen by work and by memory; near-optimal, in milliseconds.

The objective is the finishing time of the step under the semantics of simulator.py: this is
scheduling of moldable parallel tasks. What makes it tractable is the long tail of short ones.

1. Target: the lower bound (lower_bound.py) times some head room.
2. Degrees: the least that memory allows, widened until no job takes longer than the target times
   `grain`. Wider rings are more work, so the target rises to what the work now needs.
3. Rings, widest and longest first, go to columns of ranks (ring_placement.py); those for which no
   column is low enough join several columns.
4. Local jobs, longest first, go to the least loaded rank, the last ones where they fit (lpt.py).
5. On each rank local jobs are packed into microbatches by best fit. They come after the rings, so
   that a rank with local work ends with it (StepPlan.ends_together).
6. Local jobs may ride on rings that have room (backfill.py), and the order of all microbatches may
   be turned around (reorder.py): the best of few attempts by simulation.
7. Steps 1 to 5 are tried with less grain and more head room, with degrees that divide the ranks
   well, and with large local jobs among the rings (they may then widen too), until a plan is close
   to the bound or the tries are used up. The first of the best wins.

With pipeline stages a rank takes, up to a fraction of one microbatch, the sum of its microbatches
and pp_size - 1 times the longest of them, in whatever order they come. So in step 2 the time limit
is that of a microbatch, local jobs share one only up to the limit, and step 7 tries limits around
the one for which mean load plus (pp_size - 1) * limit is least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.simulation.simulator import finish_s
from hdp.scheduler.step_plan import StepPlan

from .backfill import backfilled
from .degrees import Degrees, Widening
from .list_schedule import Limits, Schedule, build_plan, schedule_jobs
from .lower_bound import needed_ticks, step_bound_s
from .reorder import pipeline_orders, reversed_order

# Restarts: (head room, grain, coarse, even). Local jobs over coarse * target are placed like rings;
# even degrees are those that divide the ranks well. First with as few rings as possible, then
# with large local jobs among them, over a grid of head room and grain.
_HEAD_ROOM = (1.0, 1.02, 1.05, 1.1, 1.3)
_GRAIN = (1.0, 0.5, 0.25)
_FEW_RINGS, _MANY_RINGS = 2.0, 0.1
_RESTARTS = (
    *((head_room, 1.0, _FEW_RINGS, even) for head_room in (1.0, 1.01) for even in (False, True)),
    *(
        (head_room, grain, _MANY_RINGS, even)
        for even in (False, True)
        for head_room in _HEAD_ROOM
        for grain in _GRAIN
    ),
)

# In batches of so many jobs riders are worth a look only if fixed_s is a part of the step.
_LARGE = 32768
# How many attempts may be looked at with riders, in batches of at most how many jobs over that
# number; and how close to the bound a plan makes more of them needless.
_FINALISTS, _FEW_JOBS, _CLOSE = 3, 8192, 1.002

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
    best: Schedule | None = None
    tried: list[Schedule] = []
    spent, entries = 0, _entries(degrees)
    for head_room, grain, coarse, even in _RESTARTS:
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
        schedule = schedule_jobs(degrees, limits)
        if schedule is None:
            continue
        tried.append(schedule)
        if best is None or schedule.end < best.end:
            best = schedule
        spent += (
            len(schedule.rings.job) + batch.num_jobs // 16 + int(schedule.degree.sum()) // 64 + 16
        )
        if best.end <= _close_enough(spent) * bound:
            break
    return _first_to_end(degrees, tried, bound)


def _first_to_end(degrees: Degrees, tried: list[Schedule], bound: int) -> StepPlan:
    """Step 6: the attempts that end first, as they are, turned around and with riders.

    What riders save, and what the reduction of gradients hides, can turn the order of attempts that
    are close: of a small batch several are looked at, by simulation.
    """
    batch, reduced = degrees.batch, degrees.batch.cost.reduce_s > 0.0
    count = max(1, min(_FINALISTS, _FEW_JOBS // batch.num_jobs))
    finalists = _finalists([(schedule.end, schedule) for schedule in tried], count)
    first = build_plan(batch, finalists[0])
    if not reduced and (degrees.fixed == 0 or finalists[0].end <= _CLOSE * bound):
        return first
    if batch.num_jobs >= _LARGE and degrees.fixed * 100 <= bound:
        return first
    best, best_s = first, finish_s(first, batch.cost)
    close_s = _CLOSE * step_bound_s(degrees, bound)
    for schedule in finalists:
        if best_s <= close_s:
            break
        variants = [] if schedule is finalists[0] else [schedule]
        variants += [reversed_order(schedule)] if reduced else []
        for variant in [*variants, *backfilled(degrees, schedule)]:
            plan = build_plan(batch, variant)
            end_s = finish_s(plan, batch.cost)
            if end_s < best_s:
                best, best_s = plan, end_s
    return best


def _finalists(tried: Sequence[tuple[float, Schedule]], count: int) -> list[Schedule]:
    """The first `count` different attempts by their end; of equal ones the first that was tried."""
    different: dict[tuple[float, int, int], Schedule] = {}
    for end, schedule in sorted(tried, key=lambda one: one[0]):
        different.setdefault((end, int(schedule.degree.sum()), len(schedule.local)), schedule)
    return list(different.values())[:count]


def _close_enough(spent: int) -> float:
    """Gap at which the search stops: the more it has cost, the sooner."""
    return 1.0005 + spent / 400_000


def _entries(degrees: Degrees) -> int:
    """Plans with more ranks on rings are not worth their size."""
    return 4 * int(degrees.low.sum()) + 64 * degrees.batch.hdp_size


# ---- pipelines ----


def _plan_pipelines(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """Step 7 by simulation: limits, then head room and wider rings, then orders."""
    best: tuple[float, StepPlan, Schedule, Limits] | None = None
    tried: list[tuple[float, Schedule]] = []
    spent, entries = 0, _entries(degrees)

    def consider(schedule: Schedule | None, limits: Limits) -> None:
        nonlocal best, spent
        if schedule is None:
            return
        plan = build_plan(batch, schedule)
        end_s = finish_s(plan, batch.cost)
        slots = batch.pp_size * int(plan.num_microbatches.max())
        spent += len(schedule.rings.job) + batch.num_jobs // 8 + slots * (8 + batch.hdp_size // 256)
        tried.append((end_s, schedule))
        if best is None or end_s < best[0]:
            best = (end_s, plan, schedule, limits)

    for limit, mean in _microbatch_limits(degrees, bound):
        limits = Limits(
            target=mean,
            degree=limit,
            coarse=limit,
            microbatch=limit,
            entries=None if best is None else entries,
        )
        if best is None or spent < _BUDGET:
            consider(schedule_jobs(degrees, limits), limits)
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
            consider(schedule_jobs(degrees, limits), limits)
    schedule, limits = best[2:]
    finalists = _finalists(tried, _FINALISTS)  # none has riders yet
    for ordered in pipeline_orders(schedule, batch.hdp_size, batch.seconds(schedule.degree)):
        if spent < _BUDGET:
            consider(ordered, limits)
    for schedule in finalists:
        for riding in backfilled(degrees, schedule):
            if spent < _BUDGET:
                consider(riding, limits)
    return best[1]


def _microbatch_limits(degrees: Degrees, bound: int) -> list[tuple[int, int]]:
    """(ticks of a microbatch, mean load then), the most promising first."""
    stages, low = degrees.batch.pp_size, degrees.low
    promise: list[tuple[int, int, int]] = []

    def promises(limit: int) -> bool:
        """Add this limit; whether the next one may be worth a look."""
        degree, ticks = low.copy(), degrees.low_ticks.copy()
        wide = np.flatnonzero((low > 1) | (ticks > limit))
        if promise and len(wide) > _MOST_RINGS:
            return False
        if len(wide):
            degree[wide], ticks[wide] = Widening(degrees, wide).fit(limit)
        mean = needed_ticks(degrees, degree, ticks, limit)
        end = mean + (stages - 1) * max(limit, int(ticks.max()))
        promise.append((end, limit, mean))
        return end <= 2 * min(promise)[0] and (stages - 1) * limit >= _LEAST_GAIN * mean

    start = limit = max(bound // stages, 1)
    while promises(limit):
        limit = int(limit * 0.75)
    # With few jobs, widening them to the least limit may mean one more microbatch for all.
    limit, best = start, min(promise)
    while limit < bound:
        limit = -(-limit * 4 // 3)
        promises(limit)
        if min(promise)[0] >= best[0]:
            break
        best = min(promise)
    return [(limit, mean) for _, limit, mean in sorted(promise)[:_LIMITS]]
