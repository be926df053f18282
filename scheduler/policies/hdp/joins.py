"""Joins: the last rings, for which no column of ring_placement.py was low enough.

Each goes to the least loaded ranks of one node, or to the least loaded whole nodes, which wait for
the highest of them. How many: the end of the ring, or of the highest rank if that is later, plus
the time that the ring takes from its ranks, waiting included, spread over all ranks; the least sum
wins. Without nodes there is one, of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .ring_placement import Ring

# The last rings become at most so many times wider than they must be, or so wide. More would
# hardly end them sooner, and plans would grow with the number of ranks times that of rings.
_WIDER, _WIDE = 8, 512


class Joins:
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
        # The ranks of each node by rising load, and their loads.
        self._order = np.argsort(self.load.reshape(-1, node), axis=1, kind="stable")
        self._rising = np.take_along_axis(self.load.reshape(-1, node), self._order, axis=1)

    def place(self, ring: int, low: int, cap: int) -> Ring:
        """Put one ring of `low` to `cap` ranks where it ends first."""
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
        """(what counts, degree, end, ranks) of the best place inside a node."""
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
        """What a place costs: the later end, and the ranks' time that it takes, over all ranks."""
        return np.maximum(ends, self.highest) + taken // len(self.load)

    def _sort(self, nodes: np.ndarray) -> None:
        loads = self.load.reshape(-1, self.node)[nodes]
        self._order[nodes] = np.argsort(loads, axis=1, kind="stable")
        self._rising[nodes] = np.take_along_axis(loads, self._order[nodes], axis=1)
