"""Columns: which ranks a ring gets, and when. Rings are stacked in time without gaps.

At first all ranks are one column of load 0. A ring goes on top of a column: if it is as wide as the
column the column grows, if it is narrower the column splits in two, the ring's ranks and the rest.
So all ranks of a column have the same rings below them, in the same order, hence the same load and
the same number of microbatches: rings do not wait for their ranks, and with pipeline stages a
shared microbatch has the same local index everywhere (`test_columns_are_even`).

Rings come by falling degree. For each one:

1. The narrowest column whose top stays below the target; of equally wide ones the least loaded.
2. If it would split that column, the rest must be of use: jobs that fit beside the ring, not yet
   placed, must have work for the rest up to the target. Otherwise the ring takes the whole column.
3. Rings for which no column is low enough come last (joins.py).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Where a job went: the local index of its microbatch on all of its ranks, and the ranks."""

    depth: int
    degree: int
    spans: tuple[tuple[int, int], ...]


class Columns:
    """The columns of one attempt. `ticks_at(ring, degree)` is the time of a ring at any degree."""

    def __init__(
        self,
        *,
        num_ranks: int,
        node: int,
        target: int,
        cap: np.ndarray,
        ticks_at: Callable[[int, int], int],
    ) -> None:
        self.num_ranks, self.node, self.target = num_ranks, node, target
        self.cap, self.ticks_at = cap.tolist(), ticks_at
        self.rings: dict[int, Ring] = {}
        self._widths: list[int] = []
        self._by_width: dict[int, list[tuple[int, int, int]]] = {}  # heaps of (load, start, depth)
        self._room: dict[int, int] = {}  # rank-ticks below the target, by width
        self._push(num_ranks, 0, 0, 0)

    def place(self, degree: np.ndarray, ticks: np.ndarray, local_work: int) -> list[int]:
        """Place rings of these degrees and ticks; returns those for which no column is low enough.

        local_work: rank-ticks of all jobs that are on one rank and not among the rings.
        """
        order = np.lexsort((-ticks, -degree))
        work = np.cumsum((degree * ticks)[order][::-1]) + local_work
        degrees, works = degree[order][::-1].tolist(), [local_work, *work.tolist()]
        slack = max(self.target * self.num_ranks - works[-1], 0)

        def supply(rest: int) -> int:
            """Work of the jobs that are at most so wide, and what may stay unused."""
            return works[bisect_left(degrees, rest + 1)] + slack

        wide, own = degree.tolist(), ticks.tolist()
        return [r for r in order.tolist() if not self._place(r, wide[r], own[r], supply)]

    def tops(self) -> tuple[np.ndarray, np.ndarray]:
        """(num_ranks,) int64 each: load in ticks and microbatches of every rank."""
        columns = sorted(
            (start, width, load, depth)
            for width, heap in self._by_width.items()
            for load, start, depth in heap
        )
        _, width, load, depth = np.array(columns, dtype=np.int64).T
        return np.repeat(load, width), np.repeat(depth, width)

    # ---- steps 1 and 2 ----

    def _place(self, ring: int, degree: int, ticks: int, supply: Callable[[int], int]) -> bool:
        for i in range(bisect_left(self._widths, degree), len(self._widths)):
            width = self._widths[i]
            load, start, depth = self._by_width[width][0]
            if load + ticks > self.target:
                continue
            if width > degree:
                rest = width - degree
                need = self._room_up_to(rest) + rest * (self.target - load)
                if need > supply(rest):
                    wider = min(width, max(self.cap[ring], degree))
                    wider_ticks = self.ticks_at(ring, wider)
                    if load + wider_ticks <= self.target:
                        degree, ticks = wider, wider_ticks
            self._pop(width)
            self._split(start, width, load, depth, degree)
            self.rings[ring] = Ring(depth=depth, degree=degree, spans=((start, degree),))
            self._push(degree, load + ticks, start, depth + 1)
            return True
        return False

    def _split(self, start: int, width: int, load: int, depth: int, degree: int) -> None:
        """Return to the columns what a ring of `degree` leaves of one of `width`, node by node."""
        at, stop = start + degree, start + width
        if degree < self.node and width > self.node:
            self._push(self.node - degree, load, at, depth)
            at = start + self.node
        if stop > at:
            self._push(stop - at, load, at, depth)

    def _room_up_to(self, width: int) -> int:
        return sum(self._room[w] for w in self._widths[: bisect_left(self._widths, width + 1)])

    def _push(self, width: int, load: int, start: int, depth: int) -> None:
        heap = self._by_width.get(width)
        if heap is None:
            heap = self._by_width[width] = []
            insort(self._widths, width)
            self._room[width] = 0
        heapq.heappush(heap, (load, start, depth))
        self._room[width] += width * (self.target - load)

    def _pop(self, width: int) -> None:
        heap = self._by_width[width]
        load, _, _ = heapq.heappop(heap)
        self._room[width] -= width * (self.target - load)
        if not heap:
            del self._by_width[width], self._room[width]
            del self._widths[bisect_left(self._widths, width)]
