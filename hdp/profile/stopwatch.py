"""Time a call, alone or on all ranks at once; shared by all measuring tools."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from hdp.attention.clock import Clock

_ENOUGH_S = 2e-3  # shorter calls are repeated until they add up to this


def median_s(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Median seconds of `call()`, after one warm-up call and one to choose the repeat count.

    On a GPU, timed by events on the current stream. group: all its ranks call this together; each
    repeat starts on all of them at once, and the slowest rank counts.
    """
    clock = Clock(device)

    def seconds(times: int) -> float:
        _meet(group, device)
        start = clock.now()
        for _ in range(times):
            call()
        return _slowest(clock.seconds(start, clock.now()), group, device) / times

    seconds(1)
    times = min(max(round(_ENOUGH_S / max(seconds(1), 1e-9)), 1), 1000)
    return median(seconds(times) for _ in range(repeats))


def _meet(group: dist.ProcessGroup | None, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _slowest(seconds: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    if group is None:
        return seconds
    worst = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    return float(worst)
