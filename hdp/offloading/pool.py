"""HostPool: host memory in slabs, handed out in extents.

Copies run at full speed only from and to pinned host memory, and pinning is slow. So slabs are
pinned once, in parallel (`Slabs`), and all requests are served from them.

The slabs form one linear address space. A request takes the lowest free addresses, possibly as
several extents: a copy is as fast in ten pieces of 100 MiB as in one. So memory does not fragment,
and the memory held does not grow with the number of distinct sizes or of microbatches: it is the
peak in use, rounded up to a slab. A forward and its backward use the space as a stack; several live
microbatches, in any order, need no special case.

A copy in flight may still read freed memory. Free extents remember their last read (`after`), and
the next writer makes its *stream* wait for it: the host never waits.

Invariants (each has a test of the same name in tests/offloading/test_pool.py):

* extents_are_disjoint   no address is handed out twice
* held_is_peak_in_use    held memory is the peak in use, rounded up to a slab
* reads_are_remembered   `take` returns the last read of any byte it hands out
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .types import PoolFull

GRANULE_BYTES = 64 << 10  # sizes are rounded up to this: smaller copies are mostly overhead


def rounded(num_bytes: int) -> int:
    """The bytes that a pool takes for a request of num_bytes."""
    return -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class Read:
    """A copy out of host memory; a later one has a higher number."""

    number: int
    event: Any


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, stop) of slab number `slab`."""

    slab: int
    start: int
    stop: int


class HostPool:
    """Free addresses in a growing number of slabs. Not thread-safe: the engine holds a lock.

    grow: called with a number of slabs; returns once that many exist.
    """

    def __init__(self, grow: Callable[[int], None], *, slab_bytes: int, max_bytes: int) -> None:
        if slab_bytes % GRANULE_BYTES or slab_bytes < GRANULE_BYTES:
            raise ValueError(f"slab_bytes={slab_bytes} must be a multiple of {GRANULE_BYTES}")
        self._grow, self._slab_bytes = grow, slab_bytes
        self.max_bytes = max_bytes // slab_bytes * slab_bytes
        self.held_bytes = self.in_use_bytes = self.peak_in_use_bytes = 0
        # Free runs [start, stop), sorted and merged if adjacent, with the last read of each.
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._reads: list[Read | None] = []

    def take(self, num_bytes: int) -> tuple[list[Extent], Read | None]:
        """Extents that total num_bytes, by address, and the last read of any of them.

        Raises PoolFull and takes nothing if they do not fit.
        """
        size = rounded(num_bytes)
        missing = size - (self.held_bytes - self.in_use_bytes)
        if missing > 0:
            self._add_slabs(-(-missing // self._slab_bytes), num_bytes)
        extents: list[Extent] = []
        after, left = None, size
        while left:
            start, read = self._starts[0], self._reads[0]
            stop = min(self._stops[0], start + left)
            if stop == self._stops[0]:
                del self._starts[0], self._stops[0], self._reads[0]
            else:
                self._starts[0] = stop
            after = _later(after, read)
            extents += self._split(start, stop)
            left -= stop - start
        self.in_use_bytes += size
        self.peak_in_use_bytes = max(self.peak_in_use_bytes, self.in_use_bytes)
        return extents, after

    def give(self, extents: list[Extent], after: Read | None) -> None:
        """Free extents from `take`; after: their last read, which may still be in flight."""
        for extent in extents:
            base = extent.slab * self._slab_bytes
            self._free(base + extent.start, base + extent.stop, after)
            self.in_use_bytes -= extent.stop - extent.start

    def _add_slabs(self, count: int, num_bytes: int) -> None:
        held = self.held_bytes + count * self._slab_bytes
        if held > self.max_bytes:
            raise PoolFull(num_bytes, self.in_use_bytes, self.max_bytes)
        self._grow(held // self._slab_bytes)
        self._free(self.held_bytes, held, None)
        self.held_bytes = held

    def _free(self, start: int, stop: int, read: Read | None) -> None:
        at = bisect_left(self._starts, start)
        assert at == 0 or self._stops[at - 1] <= start, f"address {start} freed twice"
        assert at == len(self._starts) or stop <= self._starts[at], f"address {stop} freed twice"
        first, last = at, at
        if at > 0 and self._stops[at - 1] == start:
            first, start = at - 1, self._starts[at - 1]
        if at < len(self._starts) and self._starts[at] == stop:
            last, stop = at + 1, self._stops[at]
        for joined in self._reads[first:last]:
            read = _later(read, joined)
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        self._reads[first:last] = [read]

    def _split(self, start: int, stop: int) -> list[Extent]:
        """Addresses [start, stop) as extents within single slabs."""
        result = []
        while start < stop:
            slab, offset = divmod(start, self._slab_bytes)
            length = min(stop - start, self._slab_bytes - offset)
            result.append(Extent(slab, offset, offset + length))
            start += length
        return result


def _later(a: Read | None, b: Read | None) -> Read | None:
    if a is None or b is None:
        return a or b
    return a if a.number >= b.number else b


class Slabs:
    """Creates slabs in threads: in advance with `prepare`, on demand with `grow`."""

    def __init__(self, make: Callable[[int], Any], *, slab_bytes: int, num_threads: int) -> None:
        self._make, self._slab_bytes = make, slab_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="offload-slabs")
        self._futures: list[Future] = []
        self._lock = threading.Lock()

    def prepare(self, count: int) -> None:
        """Start creating slabs in the background, up to `count` in total."""
        with self._lock:
            while len(self._futures) < count:
                self._futures.append(self._threads.submit(self._make, self._slab_bytes))

    def grow(self, count: int) -> None:
        """Return once at least `count` slabs exist. Raises the error of a slab that failed."""
        self.prepare(count)
        for future in self._futures[:count]:
            future.result()

    def __len__(self) -> int:
        return len(self._futures)

    def __getitem__(self, index: int) -> Any:
        return self._futures[index].result()

    def close(self) -> list[Any]:
        """Stop creating slabs, and return those that exist."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        done = [f for f in self._futures if not f.cancelled() and f.exception() is None]
        self._futures = []
        return [future.result() for future in done]
