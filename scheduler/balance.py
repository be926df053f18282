"""hdp: any degree for each sequence, chosen by work and by memory; near-optimal, in milliseconds.

The objective is the finishing time of the step under the semantics of simulate.py: this is
scheduling of moldable parallel tasks. What makes it tractable is the long tail of short ones.

1. Target: the lower bound (bounds.py) times some head room.
2. Degrees: the least that memory allows, widened until no job takes longer than the target times
   `grain`. Wider rings are more work, so the target rises to what the work now needs.
3. Rings, widest and longest first, go to columns of ranks (columns.py); those for which no column
   is low enough join several columns (joins.py).
4. Local jobs, longest first, go to the least loaded rank (fill.py).
5. On each rank local jobs are packed into microbatches by best fit. They come after the rings, so
   that a rank with local work ends with it (StepPlan.ends_local).
6. Steps 1 to 5 are tried with less grain and more head room, and with large local jobs among the
   rings (they may then widen too), until a plan is close to the bound or the tries are used up. The
   first of the best wins.

With pipeline stages a rank takes, up to a fraction of one microbatch, the sum of its microbatches
and pp_size - 1 times the longest of them, in whatever order they come. So in step 2 the time limit
is that of a microbatch, local jobs share one only up to the limit, and step 6 tries limits around
the one for which mean load plus (pp_size - 1) * limit is least.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .attempt import Attempt, Limits, attempt, build
from .bounds import needed_ticks
from .degrees import Degrees, Widening
from .jobs import Batch
from .plan import StepPlan

# (head room, grain, coarse): local jobs longer than coarse * target are placed among the rings.
_TRIES = (
    (1.0, 1.0, 2.0),
    (1.01, 1.0, 2.0),
    (1.0, 1.0, 0.1),
    (1.02, 1.0, 0.1),
    (1.05, 1.0, 0.1),
    (1.0, 0.5, 0.1),
    (1.02, 0.5, 0.1),
    (1.05, 0.5, 0.1),
    (1.1, 1.0, 0.1),
    (1.0, 0.34, 0.1),
    (1.02, 0.34, 0.1),
    (1.05, 0.34, 0.1),
    (1.0, 0.25, 0.1),
    (1.02, 0.25, 0.1),
    (1.05, 0.25, 0.1),
    (1.1, 0.5, 0.1),
    (1.2, 1.0, 0.1),
    (1.0, 0.125, 0.1),
    (1.05, 0.125, 0.1),
    (1.3, 1.0, 0.1),
    (1.4, 1.0, 0.1),
    (1.6, 1.0, 0.1),
)


def plan_hdp(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """The policy of the module docstring; `bound` is the lower bound in ticks."""
    best: Attempt | None = None
    spent = 0
    for limits in _tries(degrees, bound):
        made = attempt(degrees, limits)
        if best is None or made.end < best.end:
            best = made
        spent += len(made.rings.job) + batch.num_jobs // 16 + 16
        if best.end <= _close_enough(spent) * bound:
            break
    assert best is not None
    return build(batch, best)


def _close_enough(spent: int) -> float:
    """Gap at which the search stops: the more it has cost, the sooner."""
    return 1.002 + spent / 50000


def _tries(degrees: Degrees, bound: int) -> Iterator[Limits]:
    if degrees.batch.pp_size > 1:
        yield from _pipeline_tries(degrees, bound)
        return
    for head_room, grain, coarse in _TRIES:
        target = int(bound * head_room)
        yield Limits(
            target=target,
            degree=max(int(target * grain), 1),
            coarse=int(target * coarse),
        )


def _pipeline_tries(degrees: Degrees, bound: int) -> Iterator[Limits]:
    """Limits on a microbatch, the most promising first."""
    stages = degrees.batch.pp_size
    every = Widening(degrees, np.arange(degrees.batch.num_jobs))
    promise = []
    for step in range(1, 33):
        limit = max(int(bound / stages * 1.25 ** (1 - step)), 1)
        degree, ticks = every.fit(limit)
        mean = needed_ticks(degrees, degree, ticks, limit)
        longest = max(limit, int(ticks.max()))
        promise.append((mean + (stages - 1) * longest, step, limit, mean))
    for _, _, limit, mean in sorted(promise)[:4]:
        yield Limits(target=mean, degree=limit, coarse=limit, microbatch=limit)
