"""List scheduling: given a target and limits, assign every job its ranks and microbatch. Columnar.

Step numbers refer to search.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.scheduler.policies.batch import Batch, check_size
from hdp.scheduler.policies.memory import max_pack_tokens
from hdp.scheduler.policies.packing import best_fit_by_rank
from hdp.scheduler.policies.to_step_plan import assemble
from hdp.scheduler.step_plan import StepPlan

from .degrees import Degrees, Widening
from .lpt import fill
from .ring_placement import GuillotineColumns, JoinedColumns, Ring

# Where a microbatch has a time limit, its capacity is at least this many size units.
_FINE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a schedule aims at, in ticks."""

    target: int  # finishing time of the ranks, without what pipelines add
    degree: int  # jobs are widened until they take at most this
    coarse: int  # local jobs that take longer are placed as rings
    microbatch: int | None = None  # local jobs that share a microbatch take at most this
    even: bool = False  # round degrees up to ones that divide the ranks evenly
    entries: int | None = None  # most ranks on rings, summed over all rings


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Contiguous ranks of rings, (num_spans,) int64 each; a ring may have several spans."""

    job: np.ndarray
    first: np.ndarray  # rank
    size: np.ndarray  # ranks
    index: np.ndarray  # of the microbatch, on all of them

    def take(self, chosen: np.ndarray) -> Spans:
        return Spans(
            job=self.job[chosen],
            first=self.first[chosen],
            size=self.size[chosen],
            index=self.index[chosen],
        )

    def by_rank(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every rank of every span, and for each the span's value in `column`."""
        along = np.arange(int(self.size.sum())) - np.repeat(
            np.cumsum(self.size) - self.size, self.size
        )
        return np.repeat(self.first, self.size) + along, np.repeat(column, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How local jobs share microbatches: by size in tokens or in time, whichever is larger."""

    capacity: int  # of a microbatch
    token: int  # size of one token
    size: np.ndarray  # (num_jobs,) int64, at most `capacity`


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Where every job runs. `end` is the finishing time in ticks, an estimate with pipelines."""

    degree: np.ndarray  # (num_jobs,) int64
    rings: Spans
    local: np.ndarray  # (num_local,) int64, jobs on one rank that are not in `rings`
    rank: np.ndarray  # (num_local,) int64
    index: np.ndarray  # (num_local,) int64, of the microbatch on that rank
    first_free: np.ndarray  # (hdp_size,) int64, microbatches before those of `local`
    packing: Packing
    end: int


def schedule_jobs(degrees: Degrees, limits: Limits) -> Schedule | None:
    """Steps 2 to 5 of search.py; None if the rings exceed `limits.entries`."""
    batch = degrees.batch
    # 2. Degrees. A local job's share of fixed_s is its share of a microbatch.
    degree, ticks = degrees.low.copy(), degrees.low_ticks.copy()
    packing = _packing(degrees, limits.microbatch)
    part = degrees.fixed * (packing.size / packing.capacity)
    share = ticks - degrees.fixed + np.rint(part).astype(np.int64)
    jobs = np.flatnonzero((degree > 1) | (share > min(limits.degree, limits.coarse)))
    widening = Widening(degrees, jobs)
    degree[jobs], ticks[jobs] = widening.fit(limits.degree)
    if limits.even:
        degree[jobs] = widening.even(degree[jobs])
        ticks[jobs] = degrees.ticks(jobs, degree[jobs])
    if limits.entries is not None and int(degree[jobs].sum()) > limits.entries:
        return None
    work = int((np.where(degree > 1, ticks, share) * degree).sum())
    longest = int(ticks[jobs].max()) if len(jobs) else 0
    target = max(limits.target, -(-work // batch.hdp_size), longest)
    # 3. Rings.
    load, placed = _place(degrees, widening, degree[jobs], ticks[jobs], target, work)
    degree[jobs] = [ring.degree for ring in placed]
    ticks[jobs] = degrees.ticks(jobs, degree[jobs])
    rings = _spans(jobs, placed)
    first_free, loose = _loose(rings, degree, batch.hdp_size)
    np.subtract.at(load, loose.first, ticks[loose.job] - share[loose.job])
    # 4. Local jobs.
    others = np.ones(batch.num_jobs, dtype=bool)
    others[jobs] = False
    local = np.flatnonzero(others)
    local = local[np.argsort(-share[local], kind="stable")]
    rank = fill(load, share[local])
    # 5. Microbatches.
    local, rank = np.concatenate([loose.job, local]), np.concatenate([loose.first, rank])
    bins, num_bins = best_fit_by_rank(rank, packing.size[local], packing.capacity, batch.hdp_size)
    np.subtract.at(load, loose.first, share[loose.job])
    load += degrees.fixed * num_bins
    np.add.at(load, rank, ticks[local] - degrees.fixed)
    end = int(load.max())
    if batch.pp_size == 1:  # the fullest last: its backward hides the gradient reduction
        bins = num_bins[rank] - 1 - bins
    else:
        end += (batch.pp_size - 1) * max(longest, limits.microbatch or 0)
    others[loose.job] = True
    return Schedule(
        degree=degree,
        rings=rings.take(~others[rings.job]),
        local=local,
        rank=rank,
        index=first_free[rank] + bins,
        first_free=first_free,
        packing=packing,
        end=end,
    )


def _loose(rings: Spans, degree: np.ndarray, num_ranks: int) -> tuple[np.ndarray, Spans]:
    """Number of microbatches up to each rank's last ring, and jobs of degree 1 placed after it:
    those keep their rank but share microbatches like other local jobs."""
    first_free = np.zeros(num_ranks, dtype=np.int64)
    wide = rings.take(degree[rings.job] > 1)
    np.maximum.at(first_free, *wide.by_rank(wide.index + 1))
    return first_free, rings.take(
        (degree[rings.job] == 1) & (rings.index >= first_free[rings.first])
    )


def _packing(degrees: Degrees, longest: int | None) -> Packing:
    """Sizes are exact in tokens; a time limit is rounded to the safe side."""
    tokens = max_pack_tokens(degrees.batch)
    if longest is None:
        return Packing(capacity=tokens, token=1, size=np.minimum(degrees.tokens, tokens))
    token = -(-_FINE // tokens)
    capacity = token * tokens
    own = np.ceil((degrees.low_ticks - degrees.fixed) * (capacity / max(longest, 1)))
    size = np.maximum(degrees.tokens * token, own.astype(np.int64))
    return Packing(capacity=capacity, token=token, size=np.minimum(size, capacity))


def _place(
    degrees: Degrees,
    widening: Widening,
    degree: np.ndarray,
    ticks: np.ndarray,
    target: int,
    work: int,
) -> tuple[np.ndarray, list[Ring]]:
    """Step 3: guillotine columns, then joined ones. Returns the load of each rank and the rings."""
    jobs, low, cap = widening.jobs, widening.low.tolist(), widening.cap.tolist()
    columns = GuillotineColumns(
        num_ranks=degrees.batch.hdp_size,
        node=degrees.node,
        target=target,
        cap=widening.cap,
        ticks_at=lambda ring, width: int(degrees.ticks(jobs[ring], width)),
    )
    late = columns.place(degree, ticks, work - int((degree * ticks).sum()))
    load, depth = columns.tops()
    rings = columns.rings
    if late:
        joined = JoinedColumns(
            load,
            depth,
            node=degrees.node,
            ticks_at=lambda ring, widths: degrees.ticks(jobs[ring], widths),
        )
        size = (degree * ticks).tolist()
        for ring in sorted(late, key=lambda r: (-size[r], r)):
            rings[ring] = joined.place(ring, low[ring], cap[ring])
        load = joined.load
    return load, [rings[i] for i in range(len(degree))]


def _spans(jobs: np.ndarray, rings: list[Ring]) -> Spans:
    rows = [(ring.depth, first, size) for ring in rings for first, size in ring.spans]
    index, first, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    job = np.repeat(jobs, [len(ring.spans) for ring in rings])
    return Spans(job=job, first=first, size=size, index=index)


def build_plan(batch: Batch, schedule: Schedule) -> StepPlan:
    """Build the StepPlan of a schedule."""
    check_size(batch, batch.by_seq(schedule.degree))
    ones = np.ones_like(schedule.rank)
    spans = Spans(
        job=np.concatenate([schedule.rings.job, schedule.local]),
        first=np.concatenate([schedule.rings.first, schedule.rank]),
        size=np.concatenate([schedule.rings.size, ones]),
        index=np.concatenate([schedule.rings.index, schedule.index]),
    )
    spans = spans.take(np.argsort(spans.job, kind="stable"))
    ranks, index = spans.by_rank(spans.index)
    if batch.has_units:  # every sequence of a job has the job's ring
        offset = np.cumsum(schedule.degree) - schedule.degree
        count, first = batch.by_seq(schedule.degree), batch.by_seq(offset)
        along = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        take = np.repeat(first, count) + along
        ranks, index = ranks[take], index[take]
    return assemble(
        batch,
        policy="hdp",
        degree=batch.by_seq(schedule.degree),
        ring_ranks=ranks,
        index=index,
    )
