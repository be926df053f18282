"""Which degrees a job may have, and which one it needs to end in a given time.

* legal   with nodes, a ring stays inside one or spans whole ones: 1, 2, .., n, 2n, 3n, ..; without
          nodes, any degree
* low     the fewest ranks that memory allows; it is also the least work, because rank-seconds never
          fall with the degree (`test_work_never_falls`)
* fit     the fewest ranks with which a job ends in time. Inside one class of links (one node, or
          across nodes) a job's time falls with the degree, up to one point from which communication
          wins and it rises (`test_time_has_one_valley`), so both are found by bisection

Times are integer ticks (a power of two of a second): sums are exact, whatever their order, so every
machine makes the same plan from them.
"""

from __future__ import annotations

import math

import numpy as np

from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.memory import min_degrees

# The longest job, alone on one rank or on the fewest that hold it, takes about 2^TICK_BITS ticks;
# wide rings that would take more than 2^_MOST_BITS are no better than with so many.
TICK_BITS, _MOST_BITS = 36, 50
_SHORTEST_S = 1e-200


class Degrees:
    """Degrees and ticks of the jobs of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.node = batch.ranks_per_node or batch.hdp_size
        self.squares, self.tokens = batch.job_squares, batch.job_tokens
        low = min_degrees(batch)
        self.low = np.where(low <= self.node, low, -(-low // self.node) * self.node)
        self.tick_s = self._tick_s()
        self.fixed = round(batch.cost.fixed_s / self.tick_s)
        self.low_ticks = self.ticks(slice(None), self.low)

    def ticks(self, jobs: np.ndarray | slice | int, degree: np.ndarray | int) -> np.ndarray:
        """int64: ticks of these jobs on each of `degree` ranks, with fixed_s."""
        seconds = self.batch.cost.unit_s(
            self.squares[jobs], self.tokens[jobs], degree, np.asarray(degree) > self.node
        )
        ticks = np.minimum(seconds / self.tick_s, 2.0**_MOST_BITS)
        return np.rint(ticks).astype(np.int64) + self.fixed

    def _tick_s(self) -> float:
        """A power of two, so that the longest job is at most 2^TICK_BITS ticks where it must go.

        Raises ValueError for a cost model with which that is no number.
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


class Widening:
    """Some jobs of a batch, and how wide they become when they must end in time."""

    def __init__(self, degrees: Degrees, jobs: np.ndarray) -> None:
        self.degrees, self.jobs, self.node = degrees, jobs, degrees.node
        self.low, self.low_ticks = degrees.low[jobs], degrees.low_ticks[jobs]
        # The valley inside a node, then the one across nodes.
        width = degrees.batch.hdp_size
        self.inside = self._valley(self.low, np.maximum(self.low, self.node))
        self.inside_ticks = degrees.ticks(jobs, self.inside)
        self.across, self.across_ticks = self.inside, self.inside_ticks
        if width > self.node:
            bottom = np.maximum(self.low, 2 * self.node)
            self.across = self._valley(bottom, np.full_like(self.low, width))
            self.across_ticks = degrees.ticks(jobs, self.across)

    @property
    def cap(self) -> np.ndarray:
        """(num_jobs,) int64: the degree with the shortest time."""
        return np.where(self.across_ticks < self.inside_ticks, self.across, self.inside)

    @property
    def best_ticks(self) -> np.ndarray:
        """(num_jobs,) int64: the shortest time."""
        return np.minimum(self.across_ticks, self.inside_ticks)

    def fit(self, target: int) -> tuple[np.ndarray, np.ndarray]:
        """The fewest ranks with which each job takes <= target ticks, and its ticks then.

        Jobs that cannot are as fast as they get.
        """
        inside = (self.inside_ticks <= target) | (self.inside_ticks <= self.across_ticks)
        bottom = np.where(inside, self.low, np.maximum(self.low, 2 * self.node))
        low, high = self._rung(bottom), self._rung(np.where(inside, self.inside, self.across))
        while bool((open_ := low < high).any()):
            middle = (low + high) // 2
            good = self.degrees.ticks(self.jobs, self._degree(middle)) <= target
            high = np.where(open_ & good, middle, high)
            low = np.where(open_ & ~good, middle + 1, low)
        degree = self._degree(high)
        return degree, self.degrees.ticks(self.jobs, degree)

    def even(self, degree: np.ndarray) -> np.ndarray:
        """The next degrees that are a k-th of the ranks, or of a node, rounded down: k of them fit.

        Degrees beyond the one with the shortest time stay as they are.
        """
        size = self.degrees.batch.hdp_size
        some = {self.node // k for k in range(1, self.node + 1)}
        some |= {size // self.node // k * self.node for k in range(1, size // self.node + 1)}
        steps = np.array(sorted(some), dtype=np.int64)
        wider = steps[np.searchsorted(steps, degree)]
        return np.where(wider <= self.cap, wider, degree)

    def _valley(self, bottom: np.ndarray, top: np.ndarray) -> np.ndarray:
        """The legal degree in [bottom, top] from which a wider ring is no faster."""
        low, high = self._rung(bottom), self._rung(top)
        while bool((open_ := low < high).any()):
            middle = np.minimum((low + high) // 2, np.maximum(high - 1, 0))
            here = self.degrees.ticks(self.jobs, self._degree(middle))
            next_ = self.degrees.ticks(self.jobs, self._degree(middle + 1))
            falling = next_ < here
            low = np.where(open_ & falling, middle + 1, low)
            high = np.where(open_ & ~falling, middle, high)
        return self._degree(low)

    def _rung(self, degree: np.ndarray) -> np.ndarray:
        """Position of legal degrees in their rising list."""
        return np.where(degree <= self.node, degree - 1, self.node + degree // self.node - 2)

    def _degree(self, rung: np.ndarray) -> np.ndarray:
        return np.where(rung < self.node, rung + 1, (rung - self.node + 2) * self.node)
