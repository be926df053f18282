"""HostPool: host memory in slabs, handed out in extents.

A copy engine reaches host memory at full speed only where it is pinned, and pinning is slow: so it
is done once, slab by slab, in parallel (`Slabs`), and what is handed out comes from there.

The addresses of all slabs form one line. What is asked for is taken from the free addresses, lowest
first, and may come in several extents: a copy is as fast in ten pieces of 100 MiB as in one. That
is why nothing fragments, and why memory held never grows with the number of different sizes or of
microbatches: it is the most that was in use at once, rounded up to a slab. A forward and its
backward use the line as a stack; several live microbatches, in any order, are no special case.

Freed memory may still be read by a copy that is under way. The extents remember the last read
(`after`), and whoever writes there next lets its *stream* wait for it: no one waits on the host.

Invariants (each has a test of the same name in tests/offloading/test_pool.py):

* extents_are_disjoint   no address is handed out twice
* held_is_peak_in_use    held memory is the most in use at once, rounded up to a slab
* reads_are_remembered   an extent comes with the last read of any of its bytes
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .types import PoolFull

GRANULE_BYTES = 64 << 10  # sizes are rounded up to this: a copy of less is mostly overhead


def rounded(num_bytes: int) -> int:
    """What a pool takes for so many bytes."""
    return -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class Read:
    """A copy out of host memory; the later one of two has the higher number."""

    number: int
    event: Any


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, stop) of slab number `slab`."""

    slab: int
    start: int
    stop: int


class HostPool:
    """Free addresses of a growing number of slabs. Not thread-safe: its engine has the lock.

    grow: called with a number n of slabs, returns when there are n of them.
    """

    def __init__(self, grow: Callable[[int], None], *, slab_bytes: int, max_bytes: int) -> None:
        if slab_bytes % GRANULE_BYTES or slab_bytes < GRANULE_BYTES:
            raise ValueError(f"slab_bytes={slab_bytes} must be a multiple of {GRANULE_BYTES}")
        self._grow, self._slab_bytes = grow, slab_bytes
        self.max_bytes = max_bytes // slab_bytes * slab_bytes
        self.held_bytes = self.in_use_bytes = self.peak_in_use_bytes = 0
        # Free runs [start, stop), by address; adjacent ones are one. `_reads` beside them.
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._reads: list[Read | None] = []

    def take(self, num_bytes: int) -> tuple[list[Extent], Read | None]:
        """Extents of num_bytes together, by address, and the last read of any of them.

        Raises PoolFull, with nothing taken.
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
        """Return what `take` handed out; after: the last read of it that may be under way."""
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
        """A run of the line as extents of single slabs."""
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
    """Makes slabs in threads: ahead of need with `prepare`, at need with `grow`."""

    def __init__(self, make: Callable[[int], Any], *, slab_bytes: int, num_threads: int) -> None:
        self._make, self._slab_bytes = make, slab_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="offload-slabs")
        self._futures: list[Future] = []
        self._lock = threading.Lock()

    def prepare(self, count: int) -> None:
        """Start making slabs until there are `count`."""
        with self._lock:
            while len(self._futures) < count:
                self._futures.append(self._threads.submit(self._make, self._slab_bytes))

    def grow(self, count: int) -> None:
        """Return when there are at least `count` slabs. Raises what making one raised."""
        self.prepare(count)
        for future in self._futures[:count]:
            future.result()

    def __len__(self) -> int:
        return len(self._futures)

    def __getitem__(self, index: int) -> Any:
        return self._futures[index].result()

    def close(self) -> list[Any]:
        """Make no more; the slabs that were made."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        done = [f for f in self._futures if not f.cancelled() and f.exception() is None]
        self._futures = []
        return [future.result() for future in done]
