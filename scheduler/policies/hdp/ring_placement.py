"""Ring placement: which ranks a ring gets, and when. Guillotine cuts, then joined columns.

All ranks start as one column of load 0. A ring goes on top of a column: if it is as wide as the
column, the column grows; if it is narrower, the column splits into the ring's ranks and the rest
(a guillotine cut). So all ranks of a column run the same rings in the same order, and have the same
load and number of microbatches: no ring waits for its ranks, and with pipeline stages a shared
microbatch has the same local index everywhere (`test_columns_are_even`).

Rings are placed in order of falling degree:

1. Choose the narrowest column whose top stays below the target; among equally wide ones the least
   loaded.
2. Split a column only if unplaced narrower jobs can fill the remainder up to the target. Otherwise
   the ring takes the whole column, if it may be that wide.
3. Rings that fit in no column come last, and each joins several columns: the least loaded ranks of
   one node, or the least loaded whole nodes. It starts when the most loaded of them is done. The
   degree minimizes a sum: the end of the ring (or of the most loaded rank of all, if later) plus
   the rank-time that the ring takes, waiting included, averaged over all ranks. Without nodes, all
   ranks form one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Joined rings get at most _WIDER times their minimum degree, or _WIDE ranks if that is more. Wider
# ones would hardly end sooner, and plans would grow with ranks times rings.
_WIDER, _WIDE = 8, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Where a job runs: the local index of its microbatch on all of its ranks, and the ranks."""

    depth: int
    degree: int
    spans: tuple[tuple[int, int], ...]


class GuillotineColumns:
    """The columns of one schedule. `ticks_at(ring, degree)` is the time of a ring at any degree."""

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
        """Place rings with these degrees and ticks; returns those that fit in no column.

        local_work: rank-ticks of all jobs that are not placed as rings.
        """
        order = np.lexsort((-ticks, -degree))
        work = np.cumsum((degree * ticks)[order][::-1]) + local_work
        degrees, works = degree[order][::-1].tolist(), [local_work, *work.tolist()]
        slack = max(self.target * self.num_ranks - works[-1], 0)

        def supply(rest: int) -> int:
            """Work of the jobs of degree <= rest, plus the idle time that the target allows."""
            return works[bisect_left(degrees, rest + 1)] + slack

        wide, own = degree.tolist(), ticks.tolist()
        return [r for r in order.tolist() if not self._place(r, wide[r], own[r], supply)]

    def tops(self) -> tuple[np.ndarray, np.ndarray]:
        """(num_ranks,) int64 each: load in ticks and number of microbatches of every rank."""
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
        """Push what a ring of `degree` leaves of a column of `width`, split at node edges."""
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


class JoinedColumns:
    """Loads (ticks) and depths (microbatches) of all ranks, by node."""

    def __init__(
        self,
        load: np.ndarray,
        depth: np.ndarray,
        *,
        node: int,
        ticks_at: Callable[[int, np.ndarray], np.ndarray],
    ) -> None:
        self.node, self.ticks_at = node, ticks_at
        self.load, self.depth = load.copy(), depth.copy()
        self.highest = int(load.max())
        # The ranks of each node by rising load, and those loads.
        self._order = np.argsort(self.load.reshape(-1, node), axis=1, kind="stable")
        self._rising = np.take_along_axis(self.load.reshape(-1, node), self._order, axis=1)

    def place(self, ring: int, low: int, cap: int) -> Ring:
        """Place one ring of `low` to `cap` ranks at the lowest cost (`_counts`)."""
        cap = min(cap, max(_WIDER * low, _WIDE))
        options = []
        if low <= self.node:
            options.append(self._inside(ring, low, min(cap, self.node)))
        if len(self._order) > 1 and cap > self.node:
            options.append(self._across(ring, low, cap))
        assert options, f"no node holds ring {ring} of at least {low} ranks"
        _, degree, end, ranks = min(options, key=lambda option: option[:2])
        depth = int(self.depth[ranks].max())
        self.load[ranks], self.depth[ranks] = end, depth + 1
        self.highest = max(self.highest, end)
        self._sort(np.unique(ranks // self.node))
        cuts = np.flatnonzero(np.diff(ranks) > 1) + 1
        firsts, stops = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(ranks)]])
        spans = zip(ranks[firsts].tolist(), (stops - firsts).tolist(), strict=True)
        return Ring(depth=depth, degree=degree, spans=tuple(spans))

    def _inside(self, ring: int, low: int, cap: int) -> tuple[int, int, int, np.ndarray]:
        """(cost, degree, end, ranks) of the best place inside a node."""
        degrees = np.arange(low, cap + 1)
        below = np.cumsum(self._rising, axis=1)[:, low - 1 : cap]
        ends = self._rising[:, low - 1 : cap] + self.ticks_at(ring, degrees)
        counts = self._counts(ends, degrees * ends - below)
        node, column = divmod(int(np.argmin(counts)), len(degrees))
        degree = low + column
        ranks = np.sort(self._order[node, :degree]) + node * self.node
        return int(counts[node, column]), degree, int(ends[node, column]), ranks

    def _across(self, ring: int, low: int, cap: int) -> tuple[int, int, int, np.ndarray]:
        """The same for whole nodes."""
        heights = self._rising[:, -1]
        order = np.argsort(heights, kind="stable")
        first = max(2, -(-low // self.node))
        nodes = np.arange(first, cap // self.node + 1)
        degrees = nodes * self.node
        below = np.cumsum(self._rising.sum(axis=1)[order])[nodes - 1]
        ends = heights[order][nodes - 1] + self.ticks_at(ring, degrees)
        counts = self._counts(ends, degrees * ends - below)
        best = int(np.argmin(counts))
        chosen = np.sort(order[: nodes[best]])
        ranks = (chosen[:, None] * self.node + np.arange(self.node)).ravel()
        return int(counts[best]), len(ranks), int(ends[best]), ranks

    def _counts(self, ends: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Cost of a place: the later end, plus the rank-time taken averaged over all ranks."""
        return np.maximum(ends, self.highest) + taken // len(self.load)

    def _sort(self, nodes: np.ndarray) -> None:
        loads = self.load.reshape(-1, self.node)[nodes]
        self._order[nodes] = np.argsort(loads, axis=1, kind="stable")
        self._rising[nodes] = np.take_along_axis(loads, self._order[nodes], axis=1)
