"""Degrees: which ones a job may have, and the smallest that meets a deadline.

* legal   with nodes of n ranks, a ring stays inside one or spans whole ones: 1, 2, .., n, 2n, 3n,
          ..; without nodes, any degree
* low     the smallest degree that memory allows; it also has the least work, because rank-seconds
          never fall with the degree (`test_work_never_falls`)
* fit     the smallest degree at which a job meets a deadline

A job's time is that of the faster mode, passing keys around the ring or gathering them, so over all
degrees it can have several minima. Within each of three classes it has one, and bisection finds
both that minimum and the fit:

* inside    rings that pass keys around, inside a node: the time falls with the degree until
            communication dominates, then rises (`test_time_has_one_valley`)
* gathered  gathered rings, also inside a node: every added rank shortens the time
            (`test_gathered_time_never_rises`)
* across    rings that pass keys around, over whole nodes: as inside

Times are integer ticks (a power-of-two fraction of a second): sums are exact in any order, so every
machine computes the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hdp.scheduler.costs.cost_model import GATHER_LEAST_RANKS
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.memory import min_degrees

# The longest job, on one rank or on the fewest that hold it, takes about 2^TICK_BITS ticks. Times
# are capped at 2^_MOST_BITS: rings that slow need no exact order.
TICK_BITS, _MOST_BITS = 36, 50
_SHORTEST_S = 1e-200


class Degrees:
    """Degrees and ticks of the jobs of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.node = batch.ranks_per_node or batch.hdp_size
        self.squares, self.tokens = batch.job_squares, batch.job_tokens
        self.may_gather = batch.may_gather
        self.some_gather = bool(self.may_gather.any())
        low = min_degrees(batch)
        self.low = np.where(low <= self.node, low, -(-low // self.node) * self.node)
        self.tick_s = self._tick_s()
        self.fixed = round(batch.cost.fixed_s / self.tick_s)
        self.low_ticks = self.ticks(slice(None), self.low)

    def ticks(self, jobs: np.ndarray | slice | int, degree: np.ndarray | int) -> np.ndarray:
        """int64: ticks of these jobs on each of `degree` ranks in the faster mode, with fixed_s."""
        return self._cheaper(jobs, degree, self.some_gather and self.may_gather[jobs])

    def round_ticks(self, jobs: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """Like `ticks`, but with no ring gathered."""
        return self._cheaper(jobs, degree, False)

    def gathered_ticks(self, jobs: np.ndarray, degree: np.ndarray | int) -> np.ndarray:
        """Like `ticks`, but with all rings gathered; only for jobs that may be."""
        return self._rounded(self.batch.cost.piece_s(self.tokens[jobs], degree, gathered=True))

    def _cheaper(
        self,
        jobs: np.ndarray | slice | int,
        degree: np.ndarray | int,
        may_gather: np.ndarray | bool,
    ) -> np.ndarray:
        across, cost = np.asarray(degree) > self.node, self.batch.cost
        return self._rounded(
            cost.unit_s(self.squares[jobs], self.tokens[jobs], degree, across, may_gather)
        )

    def _rounded(self, seconds: np.ndarray) -> np.ndarray:
        ticks = np.minimum(seconds / self.tick_s, 2.0**_MOST_BITS)
        return np.rint(ticks).astype(np.int64) + self.fixed

    def _tick_s(self) -> float:
        """Seconds per tick: a power of two with which the longest job takes <= 2^TICK_BITS ticks.

        Raises ValueError if that job's time is zero or not finite.
        """
        longest_s = 0.0
        with np.errstate(over="ignore"):
            for degree in (np.ones_like(self.low), self.low):
                across = degree > self.node
                seconds = self.batch.cost.unit_s(self.squares, self.tokens, degree, across)
                longest_s = max(longest_s, float(seconds.max()))
        longest_s += self.batch.cost.fixed_s
        if not _SHORTEST_S < longest_s < 1.0 / _SHORTEST_S:
            raise ValueError(
                f"the cost model gives {longest_s} seconds for the longest of these sequences "
                f"({int(self.tokens.max())} tokens): check its coefficients"
            )
        return math.ldexp(1.0, math.frexp(longest_s)[1] - TICK_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rings:
    """One class of rings. Their time falls with the degree from `bottom` to `best`."""

    at: np.ndarray  # (num,) int64: the jobs of a Widening that may have such rings
    bottom: np.ndarray  # (num,) int64: smallest degree
    best: np.ndarray  # (num,) int64: fastest degree
    best_ticks: np.ndarray  # (num,) int64
    ticks: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (jobs, degrees) -> ticks


class Widening:
    """Some jobs of a batch, and the degrees at which they meet a deadline.

    cap (num_jobs,) int64 is the fastest degree of each job, best_ticks (num_jobs,) its time there.
    """

    def __init__(self, degrees: Degrees, jobs: np.ndarray) -> None:
        self.degrees, self.jobs, self.node = degrees, jobs, degrees.node
        self.low, self.low_ticks = degrees.low[jobs], degrees.low_ticks[jobs]
        node, width, everybody = degrees.node, degrees.batch.hdp_size, np.arange(len(jobs))
        inside = np.maximum(self.low, node)
        self._classes = [self._rings(everybody, self.low, inside, degrees.round_ticks)]
        if node >= GATHER_LEAST_RANKS and degrees.some_gather:
            at = np.flatnonzero(degrees.may_gather[jobs] & (self.low <= node))
            bottom = np.maximum(self.low[at], GATHER_LEAST_RANKS)
            self._classes.append(self._rings(at, bottom, inside[at], degrees.gathered_ticks))
        if width > node:
            bottom, top = np.maximum(self.low, 2 * node), np.full_like(self.low, width)
            self._classes.append(self._rings(everybody, bottom, top, degrees.round_ticks))
        first, *others = self._classes
        self.cap, self.best_ticks = first.best.copy(), first.best_ticks.copy()
        for rings in others:
            better = rings.best_ticks < self.best_ticks[rings.at]
            self.cap[rings.at[better]] = rings.best[better]
            self.best_ticks[rings.at[better]] = rings.best_ticks[better]

    def fit(self, target: int) -> tuple[np.ndarray, np.ndarray]:
        """The smallest degree at which each job takes <= target ticks, and its ticks there.

        Jobs that cannot meet the target get their fastest degree.
        """
        first, *others = self._classes
        degree = self._fewest(first, slice(None), target)
        ticks = first.ticks(self.jobs, degree)
        for rings in others:
            some = np.flatnonzero((ticks[rings.at] > target) | (degree[rings.at] > rings.bottom))
            if not len(some):
                continue
            at = rings.at[some]
            new = self._fewest(rings, some, target)
            new_ticks = rings.ticks(self.jobs[at], new)
            fewer = (new < degree[at]) | (ticks[at] > target)
            better = np.where(new_ticks <= target, fewer, new_ticks < ticks[at])
            degree[at[better]], ticks[at[better]] = new[better], new_ticks[better]
        if self.degrees.some_gather:  # at the same degree, the faster mode
            ticks = self.degrees.ticks(self.jobs, degree)
        return degree, ticks

    def even(self, degree: np.ndarray) -> np.ndarray:
        """Round degrees up to the next ranks // k or node // k, so that k rings fit side by side.

        Degrees that would pass the fastest one stay as they are.
        """
        size = self.degrees.batch.hdp_size
        some = {self.node // k for k in range(1, self.node + 1)}
        some |= {size // self.node // k * self.node for k in range(1, size // self.node + 1)}
        steps = np.array(sorted(some), dtype=np.int64)
        wider = steps[np.searchsorted(steps, degree)]
        return np.where(wider <= self.cap, wider, degree)

    def _rings(
        self,
        at: np.ndarray,
        bottom: np.ndarray,
        top: np.ndarray,
        ticks: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> _Rings:
        """Rings of degrees [bottom, top], cut off where a wider one is no faster."""
        jobs, low, high = self.jobs[at], self._rung(bottom), self._rung(top)
        while bool((open_ := low < high).any()):
            middle = np.minimum((low + high) // 2, np.maximum(high - 1, 0))
            here = ticks(jobs, self._degree(middle))
            next_ = ticks(jobs, self._degree(middle + 1))
            falling = next_ < here
            low = np.where(open_ & falling, middle + 1, low)
            high = np.where(open_ & ~falling, middle, high)
        best = self._degree(low)
        return _Rings(at=at, bottom=bottom, best=best, best_ticks=ticks(jobs, best), ticks=ticks)

    def _fewest(self, rings: _Rings, some: np.ndarray | slice, target: int) -> np.ndarray:
        """The smallest degree of a class at which these jobs meet the target, else its fastest."""
        jobs = self.jobs[rings.at[some]]
        low, high = self._rung(rings.bottom[some]), self._rung(rings.best[some])
        while bool((open_ := low < high).any()):
            middle = (low + high) // 2
            good = rings.ticks(jobs, self._degree(middle)) <= target
            high = np.where(open_ & good, middle, high)
            low = np.where(open_ & ~good, middle + 1, low)
        return self._degree(high)

    def _rung(self, degree: np.ndarray) -> np.ndarray:
        """Index of each degree in the ascending list of legal degrees."""
        return np.where(degree <= self.node, degree - 1, self.node + degree // self.node - 2)

    def _degree(self, rung: np.ndarray) -> np.ndarray:
        return np.where(rung < self.node, rung + 1, (rung - self.node + 2) * self.node)
