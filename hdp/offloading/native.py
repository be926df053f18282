"""NativeLink: the link in C++ (csrc/offload/), through ops of hdp/libhdp.so.

The same calls as StreamLink with less work per copy, and slabs that are pinned in parallel, in
large pages, next to the GPU. On a CPU its streams are threads, with random delays if asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hdp.errors import FreedError
from hdp.ops.native import LIBRARY

from .link import LinkStats
from .pool import PoolFull

_HELD, _IN_USE, _PEAK_IN_USE, _MAX, _SENT, _FETCHED = range(6)  # Link::Stat


class _Block:
    __slots__ = ("num_bytes", "number")

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number: int | None = number  # None: freed
        self.num_bytes = num_bytes


def native_available(device: torch.device) -> bool:
    """Whether the library has the link for this kind of device."""
    return device.type in LIBRARY.devices and hasattr(torch.ops.hdp, "offload_open")


class NativeLink:
    """See link.Link. seed: on a CPU, of random delays before each operation; 0: none."""

    name = "native"

    def __init__(
        self,
        device: torch.device,
        *,
        max_bytes: int,
        slab_bytes: int,
        num_threads: int = 8,
        seed: int = 0,
    ) -> None:
        if not native_available(device):
            raise ValueError(
                f"the native offload link was not built for {device.type}: run "
                "`python csrc/build.py`, or use link='torch'"
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        index = device.index if device.type == "cuda" else -1
        self._link: int | None = torch.ops.hdp.offload_open(
            index, max_bytes, slab_bytes, num_threads, seed
        )

    def stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def prepare(self, num_bytes: int) -> None:
        torch.ops.hdp.offload_prepare(self._open(), num_bytes)

    def send(self, data: Tensor, stream: int) -> _Block:
        link = self._open()
        try:
            number = torch.ops.hdp.offload_send(link, data, stream)
        except RuntimeError as error:
            if "out of host memory" in str(error):
                raise MemoryError(str(error)) from None
            raise
        if number < 0:
            stats = self.stats()
            raise PoolFull(data.numel(), stats.in_use_bytes, stats.max_bytes)
        return _Block(number, data.numel())

    def sent(self, block: _Block, stream: int) -> None:
        torch.ops.hdp.offload_sent(self._open(), _number(block), stream)

    def fetch(self, block: _Block, out: Tensor, stream: int) -> None:
        torch.ops.hdp.offload_fetch_(self._open(), _number(block), out, stream)

    def fetched(self, block: _Block, stream: int) -> None:
        torch.ops.hdp.offload_fetched(self._open(), _number(block), stream)

    def free(self, block: _Block) -> None:
        if self._link is None:
            return
        torch.ops.hdp.offload_free(self._link, _number(block))
        block.number = None

    def stats(self) -> LinkStats:
        def stat(which: int) -> Any:
            return torch.ops.hdp.offload_stat(self._open(), which)

        return LinkStats(
            held_bytes=stat(_HELD),
            in_use_bytes=stat(_IN_USE),
            peak_in_use_bytes=stat(_PEAK_IN_USE),
            max_bytes=stat(_MAX),
            sent_bytes=stat(_SENT),
            fetched_bytes=stat(_FETCHED),
        )

    def close(self) -> None:
        if self._link is not None:
            torch.ops.hdp.offload_close(self._link)
            self._link = None

    def _open(self) -> int:
        if self._link is None:
            raise FreedError("the host memory was given back: the offload engine is closed")
        return self._link


def _number(block: _Block) -> int:
    if block.number is None:
        raise FreedError(f"a block of {block.num_bytes} bytes was used after it was freed")
    return block.number
