"""Link: moves bytes between a device and the host, ordered by events alone.

A block is host memory that holds a copy of some device memory. Its lifecycle, and which stream
waits for what in each call:

    send      OUT waits for the caller's kernels so far and the last read of the host memory
    sent      the caller's stream waits for the copy out; then the device memory may be reused
    fetch     IN waits for the copy out and the caller's kernels so far (they may still use the
              previous contents of the new device memory)
    fetched   the caller's stream waits for the copy in; then the value may be used
    free      no wait; the next user of the host memory makes OUT wait for the last fetch

tests/offloading/test_link.py removes each of these waits in turn and checks that a race detector,
which sees every access, reports the race.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hdp.errors import OffloadFreedError

from .pool import Extent, HostPool, Read, Slabs
from .streams import IN, OUT, Streams
from .types import LinkStats


class _Block:
    __slots__ = ("extents", "fetched", "num_bytes", "read", "sent")

    def __init__(self, extents: list[Extent], num_bytes: int) -> None:
        self.extents: list[Extent] | None = extents  # None: freed
        self.num_bytes = num_bytes
        self.sent: Any = None  # event
        self.read: Read | None = None  # the last fetch


class Link:
    """Blocks are opaque to callers. `stream` arguments are values that `stream()` returned."""

    def __init__(
        self, streams: Streams, *, max_bytes: int, slab_bytes: int, num_threads: int = 8
    ) -> None:
        self.device = streams.device
        self._streams = streams
        self._slabs = Slabs(streams.new_slab, slab_bytes=slab_bytes, num_threads=num_threads)
        self._slab_bytes = slab_bytes
        self._pool = HostPool(self._slabs.grow, slab_bytes=slab_bytes, max_bytes=max_bytes)
        self._num_reads = self._sent_bytes = self._fetched_bytes = 0
        self._closed = False

    def stream(self) -> Any:
        """The caller's current stream."""
        return self._streams.current()

    def prepare(self, num_bytes: int) -> None:
        """Start allocating num_bytes of host memory in the background."""
        count = min(-(-num_bytes // self._slab_bytes), self._pool.max_bytes // self._slab_bytes)
        self._slabs.prepare(count)

    def send(self, data: Tensor, stream: Any) -> _Block:
        """A new block with a copy of data, (num_bytes,) uint8 on the device, as of this point in
        `stream`. The caller keeps data alive until `sent`. Raises PoolFull."""
        self._check_open()
        extents, read = self._pool.take(data.numel())
        block = _Block(extents, data.numel())
        self._streams.wait(OUT, self._streams.record(stream))
        if read is not None:
            self._streams.wait(OUT, read.event)
        self._each(block, lambda host, at: self._streams.copy(OUT, host, data[at]))
        block.sent = self._streams.record(OUT)
        self._sent_bytes += block.num_bytes
        return block

    def sent(self, block: _Block, stream: Any) -> None:
        self._check(block)
        self._streams.wait(stream, block.sent)

    def fetch(self, block: _Block, out: Tensor, stream: Any) -> None:
        """Copy a block to out, (num_bytes,) uint8, which `stream` may write now. The caller keeps
        out alive until `fetched`."""
        self._check(block)
        assert out.numel() == block.num_bytes, (out.numel(), block.num_bytes)
        self._streams.wait(IN, block.sent)
        self._streams.wait(IN, self._streams.record(stream))
        self._each(block, lambda host, at: self._streams.copy(IN, out[at], host))
        self._num_reads += 1
        block.read = Read(self._num_reads, self._streams.record(IN))
        self._fetched_bytes += block.num_bytes

    def fetched(self, block: _Block, stream: Any) -> None:
        self._check(block)
        assert block.read is not None, "fetched() before fetch()"
        self._streams.wait(stream, block.read.event)

    def free(self, block: _Block) -> None:
        if self._closed:
            return
        self._check(block)
        assert block.extents is not None
        self._pool.give(block.extents, block.read)
        block.extents = None

    def stats(self) -> LinkStats:
        pool = self._pool
        return LinkStats(
            held_bytes=len(self._slabs) * self._slab_bytes,
            in_use_bytes=pool.in_use_bytes,
            peak_in_use_bytes=pool.peak_in_use_bytes,
            max_bytes=pool.max_bytes,
            sent_bytes=self._sent_bytes,
            fetched_bytes=self._fetched_bytes,
        )

    def close(self) -> None:
        """Wait for all copies, then free all blocks and host memory."""
        if self._closed:
            return
        self._closed = True
        self._streams.synchronize()
        for slab in self._slabs.close():
            self._streams.free_slab(slab)

    def _each(self, block: _Block, copy: Callable[[Tensor, slice], None]) -> None:
        at = 0
        for extent in block.extents or ():
            length = min(extent.stop - extent.start, block.num_bytes - at)
            host = self._slabs[extent.slab][extent.start : extent.start + length]
            copy(host, slice(at, at + length))
            at += length
        assert at == block.num_bytes, (at, block.num_bytes)

    def _check(self, block: _Block) -> None:
        self._check_open()
        if block.extents is None:
            raise OffloadFreedError(
                f"a block of {block.num_bytes} bytes was used after it was freed"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise OffloadFreedError("the offload engine is closed and its host memory was freed")
