"""hdp: any degree for each sequence, chosen by work and by memory; near-optimal, in milliseconds.

The objective is the finishing time of the step under the semantics of simulate.py: this
is scheduling of moldable parallel tasks. What makes it tractable is the long tail of short ones.

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
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .assemble import assemble
from .columns import Column, Columns, Ring
from .degrees import Degrees, Widening
from .fill import best_fit_by_rank, longest_first
from .jobs import Batch
from .joins import Joins
from .memory import max_pack_tokens
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """One way to run the batch; ticks as in Degrees."""

    degree: np.ndarray  # (num_jobs,) int64
    jobs: np.ndarray  # those that columns hold
    rings: dict[int, Ring]  # by position in `jobs`
    depth: np.ndarray  # (hdp_size,) int64, microbatches before the free local jobs
    free: np.ndarray  # the other jobs
    ranks: np.ndarray  # (len(free),) int64
    bins: np.ndarray  # (len(free),) int64
    end: int  # finishing time


def plan_hdp(batch: Batch, degrees: Degrees, bound: int) -> StepPlan:
    """The policy of the module docstring; `bound` is the lower bound in ticks."""
    best: _Attempt | None = None
    spent = 0
    for head_room, grain, coarse in _TRIES:
        attempt = _attempt(degrees, int(bound * head_room), grain, coarse)
        if best is None or attempt.end < best.end:
            best = attempt
        spent += len(attempt.jobs) + len(attempt.free) // 16 + 16
        if best.end <= _close_enough(spent) * bound:
            break
    assert best is not None
    return _build(batch, best)


def _close_enough(spent: int) -> float:
    """Gap at which the search stops: the more it has cost, the sooner."""
    return 1.002 + spent / 50000


def _attempt(degrees: Degrees, target: int, grain: float, coarse: float) -> _Attempt:
    batch, capacity = degrees.batch, max_pack_tokens(degrees.batch)
    # 2. Degrees. A local job's share of fixed_s is that of its tokens in a microbatch.
    degree, ticks = degrees.low.copy(), degrees.low_ticks.copy()
    tokens = np.minimum(degrees.tokens, capacity)
    share = ticks - degrees.fixed + degrees.fixed * tokens // capacity
    limit = max(int(target * grain), 1)
    jobs = np.flatnonzero((degree > 1) | (share > min(limit, int(target * coarse))))
    widening = Widening(degrees, jobs)
    degree[jobs], ticks[jobs] = widening.fit(limit)
    share[jobs] = ticks[jobs]
    work = int((share * degree).sum())
    longest = int(ticks[jobs].max()) if len(jobs) else 0
    target = max(target, -(-work // batch.hdp_size), longest)
    # 3. Rings.
    columns, rings = _place(degrees, widening, degree[jobs], ticks[jobs], target, work)
    degree[jobs] = [rings[i].degree for i in range(len(jobs))]
    load, depth = np.zeros((2, batch.hdp_size), dtype=np.int64)
    for column in columns:
        for start, width in column.spans:
            load[start : start + width], depth[start : start + width] = column.load, column.depth
    # 4. Local jobs.
    free = np.ones(batch.num_jobs, dtype=bool)
    free[jobs] = False
    local = np.flatnonzero(free)
    local = local[np.argsort(-share[local], kind="stable")]
    ranks, _ = longest_first(load, share[local])
    # 5. Microbatches.
    bins, num_bins = best_fit_by_rank(ranks, tokens[local], capacity, batch.hdp_size)
    end = load + degrees.fixed * num_bins
    np.add.at(end, ranks, ticks[local] - degrees.fixed)
    return _Attempt(
        degree=degree,
        jobs=jobs,
        rings=rings,
        depth=depth,
        free=local,
        ranks=ranks,
        bins=bins,
        end=int(end.max()),
    )


def _place(
    degrees: Degrees,
    widening: Widening,
    degree: np.ndarray,
    ticks: np.ndarray,
    target: int,
    work: int,
) -> tuple[list[Column], dict[int, Ring]]:
    """Step 3: columns, then joins."""
    batch = degrees.batch
    known: dict[tuple[int, int], int] = {}

    def ticks_at(ring: int, width: int) -> int:
        key = (ring, width)
        if key not in known:
            known[key] = int(degrees.ticks(widening.jobs[ring], width))
        return known[key]

    cap = widening.cap
    columns = Columns(
        num_ranks=batch.hdp_size, node=degrees.node, target=target, cap=cap, ticks_at=ticks_at
    )
    late = columns.place(degree, ticks, work - int((degree * ticks).sum()))
    if not late:
        return columns.columns(), columns.rings
    joins = Joins(
        columns.columns(),
        node=degrees.node,
        num_ranks=batch.hdp_size,
        low=widening.low.tolist(),
        cap=cap.tolist(),
        ticks_at=ticks_at,
    )
    size = (degree * ticks).tolist()
    for ring in sorted(late, key=lambda r: (-size[r], r)):
        joins.place(ring)
    return joins.columns(), {**columns.rings, **joins.rings}


def _build(batch: Batch, attempt: _Attempt) -> StepPlan:
    rings = [attempt.rings[i] for i in range(len(attempt.jobs))]
    # Every job as (job, first rank, number of ranks, index), then ranks in a row for each.
    spans = [(r.depth, first, size) for r in rings for first, size in r.spans]
    owner = np.repeat(attempt.jobs, [len(r.spans) for r in rings])
    depth, first, size = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    job = np.concatenate([owner, attempt.free])
    first = np.concatenate([first, attempt.ranks])
    size = np.concatenate([size, np.ones_like(attempt.ranks)])
    index = np.concatenate([depth, attempt.depth[attempt.ranks] + attempt.bins])
    order = np.argsort(job, kind="stable")
    job, first, size, index = job[order], first[order], size[order], index[order]
    along = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    ranks, index = np.repeat(first, size) + along, np.repeat(index, size)
    if batch.has_units:  # every sequence of a job has the job's ring
        degree = attempt.degree
        offsets = np.cumsum(degree) - degree
        by_seq = batch.by_seq(np.arange(batch.num_jobs))
        count = degree[by_seq]
        take = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        take += np.repeat(offsets[by_seq], count)
        ranks, index = ranks[take], index[take]
    return assemble(
        batch,
        policy="hdp",
        degree=batch.by_seq(attempt.degree),
        ring_ranks=ranks,
        index=index,
    )
