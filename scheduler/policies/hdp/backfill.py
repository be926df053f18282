"""Riders: local jobs in the room that rings leave in their microbatches.

They save `fixed_s` of the microbatches that they would need, and a longer last microbatch hides
more of the reduction; but ranks whose riders take less time wait for the others of the ring. Two
ways to choose them; which is best, if any, the simulator says.

* whole     a ring that is the last one of all its ranks takes all of their local jobs, if they fit:
            what follows the ring then rides on it, so nobody waits any longer than before
* anywhere  every ring's room is one more bin of its ranks when they pack their local jobs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hdp.scheduler.policies.packing import best_fit_by_rank

from .degrees import Degrees
from .list_schedule import Attempt


def with_riders(degrees: Degrees, made: Attempt) -> Iterator[Attempt]:
    """The attempt with riders, in both ways, where there is room for any."""
    batch = degrees.batch
    shards = batch.tokens_per_rank(made.degree)[made.rings.job]
    room = np.maximum(batch.max_tokens_per_rank - shards, 0)
    if not len(made.local) or not room.any():
        return
    if degrees.fixed == 0 and batch.cost.reduce_s == 0:
        return
    yield _whole(degrees, made, room)
    yield _anywhere(degrees, made, room)


def _whole(degrees: Degrees, made: Attempt, room: np.ndarray) -> Attempt:
    ranks, num_ranks = made.rings, degrees.batch.hdp_size
    tokens = np.bincount(made.rank, weights=degrees.tokens[made.local], minlength=num_ranks)
    on, index = ranks.by_rank(ranks.index)
    _, job = ranks.by_rank(ranks.job)
    _, left = ranks.by_rank(room)
    suits = (index + 1 == made.first_free[on]) & (tokens[on] <= left)
    good = np.ones(degrees.batch.num_jobs, dtype=bool)
    np.logical_and.at(good, job, suits)
    target = np.full(num_ranks, -1, dtype=np.int64)
    np.maximum.at(target, on, np.where(good[job], index, -1))
    rides = target[made.rank] >= 0
    return replace(made, index=np.where(rides, target[made.rank], made.index))


def _anywhere(degrees: Degrees, made: Attempt, room: np.ndarray) -> Attempt:
    batch, packing = degrees.batch, made.packing
    on, index = made.rings.by_rank(made.rings.index)
    _, left = made.rings.by_rank(np.minimum(room * packing.token, packing.capacity))
    opened = np.zeros((batch.hdp_size, int(index.max()) + 1), dtype=np.int64)
    opened[on, index] = left
    bins, _ = best_fit_by_rank(
        made.rank, packing.size[made.local], packing.capacity, batch.hdp_size, opened=opened
    )
    new = bins - opened.shape[1]
    return replace(made, index=np.where(new >= 0, made.first_free[made.rank] + new, bins))
