"""Joins: the last rings, for which no column of columns.py was low enough.

Each goes on top of several columns at once, which wait for the highest of them: the least loaded
ranks of one node, or the least loaded whole nodes. The number of them is where the ring ends first;
as long as that is below the highest column of all, fewer ranks (less work) are better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .columns import Column, Ring

# Nodes that are tried for a ring inside one node.
_NODES = 16


class Joins:
    """Columns by node. Without nodes there is one, of all ranks."""

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        node: int,
        num_ranks: int,
        low: Sequence[int],
        cap: Sequence[int],
        ticks_at: Callable[[int, int], int],
    ) -> None:
        self.node, self.low, self.cap, self.ticks_at = node, low, cap, ticks_at
        self.rings: dict[int, Ring] = {}
        self.nodes: list[list[Column]] = [[] for _ in range(num_ranks // node)]
        self.highest = max(column.load for column in columns)
        for column in columns:
            for start, width in column.spans:
                for first in range(start, start + width, node) if width > node else (start,):
                    part = min(width, node)
                    self.nodes[first // node].append(
                        Column(
                            load=column.load,
                            depth=column.depth,
                            width=part,
                            spans=((first, part),),
                        )
                    )
        for mine in self.nodes:
            mine.sort(key=_height)

    def place(self, ring: int) -> None:
        """Put one ring where it ends first."""
        low, cap = self.low[ring], self.cap[ring]
        inside = self._inside(ring, low, cap) if low <= self.node else None
        across = None
        if len(self.nodes) > 1 and cap > self.node:
            across = self._across(ring, low, cap)
        if inside is not None and (across is None or inside[0] <= across[0]):
            _, end, place, degree = inside
            self.nodes[place], ring_at = _join(self.nodes[place], degree, end)
        else:
            assert across is not None, f"no node holds ring {ring} of at least {low} ranks"
            _, end, degree = across
            order = sorted(range(len(self.nodes)), key=lambda n: _height(self.nodes[n][-1]))
            chosen = sorted(order[: degree // self.node])
            parts = [column for n in chosen for column in self.nodes[n]]
            depth = max(column.depth for column in parts)
            spans = tuple((n * self.node, self.node) for n in chosen)
            ring_at = Ring(depth=depth, degree=degree, spans=spans)
            for n in chosen:
                top = ((n * self.node, self.node),)
                self.nodes[n] = [Column(load=end, depth=depth + 1, width=self.node, spans=top)]
        self.rings[ring] = ring_at
        self.highest = max(self.highest, end)

    def columns(self) -> list[Column]:
        return [column for mine in self.nodes for column in mine]

    def _inside(
        self, ring: int, low: int, cap: int
    ) -> tuple[tuple[int, int], int, int, int] | None:
        """Best (rank of choice, end, node, degree) for a ring inside one node."""
        order = list(range(len(self.nodes)))
        if len(self.nodes) > _NODES:
            order = sorted(order, key=lambda n: _height(self.nodes[n][0]))[:_NODES]
        best = None
        for n in order:
            width = 0
            for column in self.nodes[n]:
                width += column.width
                degree = min(width, cap)
                if degree < low:
                    continue
                end = column.load + self.ticks_at(ring, degree)
                key = (max(end, self.highest), degree)
                if best is None or key < best[0]:
                    best = (key, end, n, degree)
                if width >= cap:
                    break
        return best

    def _across(self, ring: int, low: int, cap: int) -> tuple[tuple[int, int], int, int] | None:
        """Best (rank of choice, end, degree) for a ring of whole nodes."""
        heights = sorted(_height(mine[-1]) for mine in self.nodes)
        best = None
        for count in range(max(2, -(-low // self.node)), cap // self.node + 1):
            degree = count * self.node
            end = heights[count - 1][0] + self.ticks_at(ring, degree)
            key = (max(end, self.highest), degree)
            if best is None or key < best[0]:
                best = (key, end, degree)
        return best


def _height(column: Column) -> tuple[int, tuple[tuple[int, int], ...]]:
    return (column.load, column.spans)


def _join(columns: list[Column], degree: int, end: int) -> tuple[list[Column], Ring]:
    """Put a ring on the lowest `degree` ranks of these columns, which are sorted by height."""
    need, taken, rest = degree, [], []
    for column in columns:
        if need >= column.width:
            taken.append(column)
            need -= column.width
            continue
        if need == 0:
            rest.append(column)
            continue
        left, right = _cut(column, need)
        taken.append(left)
        rest.append(right)
        need = 0
    depth = max(column.depth for column in taken)
    spans = tuple(sorted(span for column in taken for span in column.spans))
    top = Column(load=end, depth=depth + 1, width=degree, spans=spans)
    return sorted([*rest, top], key=_height), Ring(depth=depth, degree=degree, spans=spans)


def _cut(column: Column, width: int) -> tuple[Column, Column]:
    """The first `width` ranks of a column, and the others."""
    left, right, need = [], [], width
    for start, size in column.spans:
        part = min(size, need)
        need -= part
        if part:
            left.append((start, part))
        if size > part:
            right.append((start + part, size - part))
    return tuple(
        Column(load=column.load, depth=column.depth, width=w, spans=tuple(spans))
        for w, spans in ((width, left), (column.width - width, right))
    )  # type: ignore[return-value]
