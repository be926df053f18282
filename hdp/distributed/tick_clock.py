"""TickClock: time that passes only while this process runs."""

from __future__ import annotations

import time


class TickClock:
    """Seconds between ticks, capped at `most_s`.

    A process that was itself frozen (by a debugger, or a scheduler that suspends jobs) must not
    mistake its own absence for the silence of others.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s, self._last = most_s, time.monotonic()

    def tick_s(self) -> float:
        last, self._last = self._last, time.monotonic()
        return min(self._last - last, self._most_s)
