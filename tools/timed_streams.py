"""TimedStreams: streams of a device that is not there, which keep time.

Copies are done at once and take time on a clock: those of one direction follow each other at
`bytes_per_s`. The caller says how long its kernels take (`compute`) and reads from `now_s` where it
is, and from `stalled_s` how long it had to wait for copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdp.offloading.streams import IN, OUT

CALLER = "caller"


class TimedStreams:
    """`hdp.offloading.streams.Streams` on a clock. An event is the second at which it fires."""

    def __init__(self, bytes_per_s: float) -> None:
        self.device = torch.device("cpu")
        self.now_s = self.stalled_s = 0.0
        self._bytes_per_s = bytes_per_s
        self._idle_s = {OUT: 0.0, IN: 0.0}  # when the copies queued so far are done

    def compute(self, seconds: float) -> None:
        """The caller's kernels take so long."""
        self.now_s += seconds

    def current(self) -> str:
        return CALLER

    def record(self, stream: str) -> float:
        return self.now_s if stream == CALLER else self._idle_s[stream]

    def wait(self, stream: str, event: float) -> None:
        if stream == CALLER:
            self.stalled_s += max(event - self.now_s, 0.0)
            self.now_s = max(self.now_s, event)
        else:
            self._idle_s[stream] = max(self._idle_s[stream], event)

    def copy(self, stream: str, dst: Tensor, src: Tensor) -> None:
        self._idle_s[stream] += dst.numel() / self._bytes_per_s
        dst.copy_(src)

    def new_slab(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def free_slab(self, slab: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        pass
