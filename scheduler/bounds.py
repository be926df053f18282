"""Lower bounds: no plan can finish a step earlier. The gap to them comes with every plan.

A step that ends by time T gives each sequence a degree with which it takes at most T, hence at
least the work of the fewest such ranks; the sum over all sequences must fit hdp_size * T
rank-seconds. The bound is the smallest T, up to 0.1 %, for which it does. It contains

* work     every sequence at the least degree that memory allows, over all ranks
* longest  no sequence ends before its best degree does
* memory   a step has at least tokens / capacity microbatches, and each rank at least one; each
           costs fixed_s. Of sequences that need more than half of the ranks no two run at once, of
           those that need more than a third no three, and so on
* pipeline a microbatch passes all pp_size stages before the last one can start, and again after
           it is done: fixed_s for each

The bound is for plans in which a ring is one sequence's. Units are left out of account, and so is
what sequences of a unit save by going round together: communication is free for batches with units.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .degrees import Degrees, Widening

_PRECISION = 1000  # the bound is found up to one part of this


def lower_bound_s(degrees: Degrees, ticks: int | None = None) -> float:
    """Seconds below which no valid plan can finish; `ticks` of lower_bound_ticks if known."""
    batch = degrees.batch
    if batch.has_units:
        count = np.arange(batch.num_seqs + 1)
        cost = replace(batch.cost, kv_bytes_per_token=0.0, ring_step_s=0.0)
        alone = replace(batch, job_offsets=count, job_seqs=count[:-1], cost=cost)
        degrees, ticks = Degrees(alone), None
    if ticks is None:
        ticks = lower_bound_ticks(degrees)
    return ticks * degrees.tick_s + (batch.pp_size - 1) * batch.cost.fixed_s


def lower_bound_ticks(degrees: Degrees) -> int:
    """The bound on compute, communication and fixed_s of one pipeline stage, in ticks."""
    low = degrees.low
    bottom = _needed(degrees, low, degrees.low_ticks)
    wide = np.flatnonzero((low > 1) | (degrees.low_ticks > bottom))
    if not len(wide):
        return bottom
    widening = Widening(degrees, wide)
    bottom = max(bottom, int(widening.best_ticks.max()), _few_at_once(widening))

    def needed(target: int) -> int:
        """Ticks of all ranks for the work that jobs are when each must end by `target`."""
        degree, ticks = low.copy(), degrees.low_ticks.copy()
        degree[wide], ticks[wide] = widening.fit(target)
        return _needed(degrees, degree, ticks)

    top = needed(bottom)
    while top - bottom > bottom // _PRECISION:
        middle = (bottom + top) // 2
        now = needed(middle)
        if now > middle:
            bottom, top = middle, min(top, now)
        else:
            top = middle
    return bottom


def _needed(degrees: Degrees, degree: np.ndarray, ticks: np.ndarray) -> int:
    """Rank-ticks of all microbatches over the ranks, rounded up."""
    batch = degrees.batch
    capacity = float(batch.max_tokens_per_rank)
    if batch.offload:
        capacity = capacity / (1.0 - batch.cost.offloadable)
    on_rings = int(degree[degree > 1].sum())
    microbatches = max(on_rings, math.ceil(int(batch.seqlens.sum()) / capacity), batch.hdp_size)
    work = int(((ticks - degrees.fixed) * degree).sum()) + degrees.fixed * microbatches
    return -(-work // batch.hdp_size)


def _few_at_once(widening: Widening) -> int:
    """Jobs that need many ranks run one after the other, or few at once."""
    order = np.argsort(-widening.low, kind="stable")
    at_once = widening.batch.hdp_size // widening.low[order]
    return int((np.cumsum(widening.best_ticks[order]) // at_once).max())
