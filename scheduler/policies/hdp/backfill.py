"""Backfill: move local jobs into the token room that rings leave in their microbatches.

This saves the `fixed_s` of the microbatches that the jobs would need, and a longer last microbatch
hides more of the gradient reduction. The price: ranks whose backfilled jobs take less time wait for
the rest of the ring. There are two variants; the simulator decides which to keep, if any.

* whole     a ring that is the last one on all of its ranks takes all of their local jobs, if they
            fit: work that followed the ring now runs inside it, so no rank waits longer than before
* anywhere  the room of every ring is an extra bin when its ranks pack their local jobs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hdp.scheduler.policies.packing import best_fit_by_rank

from .degrees import Degrees
from .list_schedule import Schedule


def backfilled(degrees: Degrees, schedule: Schedule) -> Iterator[Schedule]:
    """Yield both backfilled variants; none if no ring has room or nothing could be saved."""
    batch = degrees.batch
    shards = batch.tokens_per_rank(schedule.degree)[schedule.rings.job]
    room = np.maximum(batch.max_tokens_per_rank - shards, 0)
    if not len(schedule.local) or not room.any():
        return
    if degrees.fixed == 0 and batch.cost.reduce_s == 0:
        return
    yield _whole(degrees, schedule, room)
    yield _anywhere(degrees, schedule, room)


def _whole(degrees: Degrees, schedule: Schedule, room: np.ndarray) -> Schedule:
    ranks, num_ranks = schedule.rings, degrees.batch.hdp_size
    tokens = np.bincount(schedule.rank, weights=degrees.tokens[schedule.local], minlength=num_ranks)
    on, index = ranks.by_rank(ranks.index)
    _, job = ranks.by_rank(ranks.job)
    _, left = ranks.by_rank(room)
    suits = (index + 1 == schedule.first_free[on]) & (tokens[on] <= left)
    good = np.ones(degrees.batch.num_jobs, dtype=bool)
    np.logical_and.at(good, job, suits)
    target = np.full(num_ranks, -1, dtype=np.int64)
    np.maximum.at(target, on, np.where(good[job], index, -1))
    moves = target[schedule.rank] >= 0
    return replace(schedule, index=np.where(moves, target[schedule.rank], schedule.index))


def _anywhere(degrees: Degrees, schedule: Schedule, room: np.ndarray) -> Schedule:
    batch, packing = degrees.batch, schedule.packing
    on, index = schedule.rings.by_rank(schedule.rings.index)
    _, left = schedule.rings.by_rank(np.minimum(room * packing.token, packing.capacity))
    opened = np.zeros((batch.hdp_size, int(index.max()) + 1), dtype=np.int64)
    opened[on, index] = left
    bins, _ = best_fit_by_rank(
        schedule.rank, packing.size[schedule.local], packing.capacity, batch.hdp_size, opened=opened
    )
    new = bins - opened.shape[1]
    return replace(
        schedule, index=np.where(new >= 0, schedule.first_free[schedule.rank] + new, bins)
    )
