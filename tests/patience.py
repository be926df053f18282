"""patience: how long a test waits for something that may hang, given the machine's current load.

A limit in a test exists to detect hangs, not to judge speed, so every limit goes through here:

    subprocess.run(command, timeout=patience(60))
    wait_for(lambda: path.exists())

On a quiet machine `patience(60)` is 60. It grows when the machine is slow: with more processes than
CPUs (the load average), and with CPUs that are slow or shared invisibly (how long Python takes to
start). HDP_TEST_PATIENCE=5 sets the factor by hand, for a debugger or an emulator.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

QUICK_START_S = 0.1  # an idle core starts Python in a fifth of this
MOST = 10.0  # upper bound, so that a hang is always detected


def patience(seconds: float) -> float:
    """Scale `seconds` on a quiet machine to this machine's current load; never less."""
    given = os.environ.get("HDP_TEST_PATIENCE")
    return seconds * (float(given) if given else min(MOST, max(1.0, _load(), _slowness())))


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return as soon as `condition` holds; AssertionError if it does not within `seconds`."""
    end = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < end, f"timed out after {patience(seconds):.0f} s"
        time.sleep(0.01)


def _load() -> float:
    """Runnable processes per CPU, over the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


@functools.cache
def _slowness() -> float:
    """Python's start-up time relative to QUICK_START_S, measured once per process."""
    times = [time.perf_counter()]
    for _ in range(3):
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times)) / QUICK_START_S
