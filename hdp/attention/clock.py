"""Clock: timestamps on the device's own timeline, taken without a synchronization.

On a GPU the host runs ahead, so host time does not show when work ran: a mark is an event on the
current stream, read after the step. On a CPU a mark is the host's time.
"""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any  # float (CPU) or torch.cuda.Event; only a Clock looks inside


class Clock:
    """Marks for one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Mark:
        """A mark at the point where all work queued so far is done."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds from `start` to `end`. On a GPU this waits until `end` has happened."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
