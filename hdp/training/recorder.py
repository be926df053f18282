"""StepRecorder: the measured side of the timeline.

Time zero is when all ranks have agreed on the plan. They pass that point together, so spans of
different ranks share one time axis. Marks are taken without synchronizing the device and read once,
after the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hdp.attention.clock import Clock, Mark
from hdp.attention.comm import RingComm
from hdp.scheduler import Span


class StepRecorder:
    """Collects one rank's spans of one step."""

    def __init__(self, rank: int, comm: RingComm) -> None:
        self._rank, self._comm = rank, comm
        self._clock: Clock = comm.clock
        self._parts: list[tuple[str, str, Mark, Mark, list[tuple[Mark, Mark]]]] = []
        self.bytes_sent = 0

    def start(self) -> None:
        """Set time zero and forget the previous step."""
        self._comm.take_stats()
        self._parts = []
        self.bytes_sent = 0
        self._origin = self._clock.now()

    @contextmanager
    def span(self, kind: str, name: str) -> Iterator[None]:
        """Time the enclosed block; waits for the ring inside it become spans of their own."""
        begin = self._clock.now()
        yield
        stats = self._comm.take_stats()
        self.bytes_sent += stats.bytes_sent
        self._parts.append((kind, name, begin, self._clock.now(), stats.waits))

    def spans(self) -> list[Span]:
        """The spans in order, without overlap, in seconds from `start()`."""
        result: list[Span] = []

        def add(kind: str, name: str, start_s: float, end_s: float) -> None:
            if end_s > start_s:
                result.append(
                    Span(rank=self._rank, kind=kind, name=name, start_s=start_s, end_s=end_s)
                )

        for kind, name, begin, end, waits in self._parts:
            at = self._clock.seconds(self._origin, begin)
            for wait_begin, wait_end in waits:
                wait_at = self._clock.seconds(self._origin, wait_begin)
                add(kind, name, at, wait_at)
                at = self._clock.seconds(self._origin, wait_end)
                add("wait", name, wait_at, at)
            add(kind, name, at, self._clock.seconds(self._origin, end))
        return result
