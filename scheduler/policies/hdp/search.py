"""hdp: list scheduling of moldable tasks with restarts; near-optimal plans in milliseconds.

A sequence is a moldable task: it may run on any number of ranks (its degree), and more ranks
shorten it but cost more rank-seconds in total. The objective is the makespan of the step as
simulator.py defines it. The long tail of short sequences makes the problem tractable.

1. Target: the lower bound (lower_bound.py) times some head room.
2. Degrees: the minimum that memory allows, widened until no job takes longer than the target times
   `grain`. Wider rings add work, so the target rises to what the work now needs.
3. Rings, widest and longest first, go to columns of ranks by guillotine cuts; a ring that fits
   under the target in no column joins several (ring_placement.py).
4. Local jobs go to ranks by LPT (longest processing time first), the tail by best fit (lpt.py).
5. Each rank packs its local jobs into microbatches by best fit. They follow the rings, so that a
   rank with local work ends with it (StepPlan.ends_together).
6. Backfill the room in ring microbatches with local jobs (backfill.py) and reverse the order of
   microbatches (reorder.py). The simulator picks the best variant of a few finalists.
7. Restart steps 1 to 5 over a grid of settings (`_RESTARTS`): more head room, finer grain, degrees
   that divide the ranks evenly, and large local jobs placed (and possibly widened) as rings. Stop
   once a plan is close to the bound. Ties go to the earliest restart.

With pipeline stages a rank takes, up to a fraction of one microbatch, the sum of its microbatches
plus pp_size - 1 times the longest of them, whatever their order. So in step 2 the time limit is
that of a microbatch, local jobs share a microbatch only up to that limit, and step 7 tries limits
around the one that minimizes mean load + (pp_size - 1) * limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hdp.scheduler.policies.batch import MOST_PIECES, Batch
from hdp.scheduler.simulation.one_f_one_b import MOST_OPERATIONS
from hdp.scheduler.simulation.simulator import finish_s
from hdp.scheduler.step_plan import StepPlan

from .backfill import backfilled
from .degrees import Degrees, Widening
from .list_schedule import Limits, Schedule, build_plan, schedule_jobs
from .lower_bound import needed_ticks, step_bound_s
from .reorder import pipeline_orders, reversed_order

# Restarts: (head room, grain, coarse, even). Local jobs longer than coarse * target are placed as
# rings; `even` rounds degrees up to ones that divide the ranks evenly. First with as few rings as
# possible, then with large local jobs as rings, over a grid of head room and grain.
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

# Batches with at least this many jobs skip step 6 unless fixed_s is over 1% of the bound.
_LARGE = 32768
# Step 6: most finalists; most finalists times jobs (one is always allowed); and the ratio to the
# bound below which the remaining ones are skipped.
_FINALISTS, _FEW_JOBS, _CLOSE = 3, 8192, 1.002

# Pipelines: microbatch limits to try; the share of the mean load below which a limit's pipeline
# overhead is too small to reduce further; and the search budget, in units of about 10 us.
_LIMITS = 5
_LEAST_GAIN = 0.04
_BUDGET = 30_000
_MOST_RINGS = 20_000


def plan_hdp(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """Plan with the algorithm of the module docstring; `bound` is the lower bound in ticks."""
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
        if schedule is None or _pieces(batch, schedule) > MOST_PIECES:
            continue
        tried.append(schedule)
        if best is None or schedule.end < best.end:
            best = schedule
        spent += (
            len(schedule.rings.job) + batch.num_jobs // 16 + int(schedule.degree.sum()) // 64 + 16
        )
        if best.end <= _close_enough(spent) * bound:
            break
    if not tried:  # no job is widened
        work = int((degrees.low_ticks * degrees.low).sum())
        limits = Limits(target=max(bound, work // batch.hdp_size), degree=work, coarse=work)
        tried = [schedule for schedule in (schedule_jobs(degrees, limits),) if schedule]
    return _first_to_end(degrees, tried, bound)


def _pieces(batch: Batch, schedule: Schedule) -> int:
    return int((schedule.degree * np.diff(batch.job_offsets)).sum())


def _first_to_end(degrees: Degrees, tried: list[Schedule], bound: int) -> StepPlan:
    """Step 6: the best of the finalists as they are, reversed, and backfilled.

    What backfill saves and how much of the gradient reduction is hidden can change the ranking of
    close attempts, so for a small batch several are simulated.
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
    """The `count` earliest-ending distinct attempts; ties go to the one tried first."""
    different: dict[tuple[float, int, int], Schedule] = {}
    for end, schedule in sorted(tried, key=lambda one: one[0]):
        different.setdefault((end, int(schedule.degree.sum()), len(schedule.local)), schedule)
    return list(different.values())[:count]


def _close_enough(spent: int) -> float:
    """Ratio to the bound at which the search stops; it relaxes as the search spends more."""
    return 1.0005 + spent / 400_000


def _entries(degrees: Degrees) -> int:
    """Most (ring, rank) entries of a restart; plans beyond that are not worth their size."""
    return 4 * int(degrees.low.sum()) + 64 * degrees.batch.hdp_size


# ---- pipelines ----


def _plan_pipelines(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """Step 7 by simulation: limits, then head room and wider rings, then orders and backfill."""
    best: tuple[float, StepPlan, Schedule, Limits] | None = None
    tried: list[tuple[float, Schedule]] = []
    spent, entries = 0, _entries(degrees)

    # Wider rings or shorter microbatches than can be simulated are not tried.
    most = MOST_OPERATIONS // (4 * batch.pp_size)
    entries = min(entries, most)

    def consider(schedule: Schedule | None, limits: Limits) -> None:
        nonlocal best, spent
        if schedule is None:
            return
        plan = build_plan(batch, schedule)
        if limits.entries is not None and len(plan.offload_ratio) > 2 * most:
            return
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
            entries=most if best is None else entries,
        )
        if best is None or spent < _BUDGET:
            consider(schedule_jobs(degrees, limits), limits)
    if best is None:  # as few rings as memory allows
        longest = max(int(degrees.low_ticks.max()), bound)
        mean = needed_ticks(degrees, degrees.low, degrees.low_ticks)
        limits = Limits(target=mean, degree=longest, coarse=longest, microbatch=longest)
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
    finalists = _finalists(tried, _FINALISTS)  # none is backfilled yet
    for ordered in pipeline_orders(schedule, batch.hdp_size, batch.seconds(schedule.degree)):
        if spent < _BUDGET:
            consider(ordered, limits)
    for schedule in finalists:
        for variant in backfilled(degrees, schedule):
            if spent < _BUDGET:
                consider(variant, limits)
    return best[1]


def _microbatch_limits(degrees: Degrees, bound: int) -> list[tuple[int, int]]:
    """(microbatch limit in ticks, mean load under it), most promising first."""
    stages, low = degrees.batch.pp_size, degrees.low
    promise: list[tuple[int, int, int]] = []

    def promises(limit: int) -> bool:
        """Add this limit; returns whether the next one may be worth trying."""
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
    while promises(limit) and limit > 1:
        limit = int(limit * 0.75)
    # With few jobs, widening them to the smallest limit may cost every rank one more microbatch.
    limit, best = start, min(promise)
    while limit < bound:
        limit = -(-limit * 4 // 3)
        promises(limit)
        if min(promise)[0] >= best[0]:
            break
        best = min(promise)
    return [(limit, mean) for _, limit, mean in sorted(promise)[:_LIMITS]]
