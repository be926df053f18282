"""StepRecorder: waits are separated from the work around them."""

from __future__ import annotations

from hdp.attention.comm import CommStats
from hdp.training.recorder import StepRecorder


class FakeClock:
    """Marks are plain seconds."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    def seconds(self, start, end):
        return end - start


class FakeComm:
    def __init__(self):
        self.clock, self.stats = FakeClock(), CommStats()

    def take_stats(self):
        taken, self.stats = self.stats, CommStats()
        return taken


def test_waits_are_spans_of_their_own():
    comm = FakeComm()
    recorder = StepRecorder(3, comm)
    comm.stats.bytes_sent = 999  # of the step before
    recorder.start()
    with recorder.span("compute", "0"):
        comm.clock.time += 2.0
        comm.stats.waits.append((comm.clock.time, comm.clock.time + 0.5))
        comm.stats.bytes_sent = 10
        comm.clock.time += 1.5
    with recorder.span("reduce", "gradients"):
        comm.clock.time += 0.25
        comm.stats.bytes_sent = 5
    spans = [(s.rank, s.kind, s.name, s.start_s, s.end_s) for s in recorder.spans()]
    assert spans == [
        (3, "compute", "0", 0.0, 2.0),
        (3, "wait", "0", 2.0, 2.5),
        (3, "compute", "0", 2.5, 3.5),
        (3, "reduce", "gradients", 3.5, 3.75),
    ]
    assert recorder.bytes_sent == 15
    recorder.start()
    assert recorder.spans() == []
    assert recorder.bytes_sent == 0
