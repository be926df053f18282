"""Host time of offload: what the engine and its link spend in Python and C++ per saved tensor.

    OMP_NUM_THREADS=1 python tools/bench_offload_host.py               # CPU time of this thread
    python tools/bench_offload_host.py --device cuda                   # wall time; kernels are tiny

Tensors have 256 bytes, so that only the bookkeeping counts. Columns, in microseconds per tensor:

    send .. free        each call of the link, alone; `link` is their sum
    forward, backward   a chain of operations that each save one tensor, all of which travel, less
                        the same chain without offload
    ratio               forward + backward, to the first link's

Medians; on a CPU by the clock of the thread, which other work on the machine does not touch.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch

from hdp import console
from hdp.offloading.engine import OffloadEngine
from hdp.offloading.forward import Treatment, Windows
from hdp.offloading.link import Link, StreamLink
from hdp.offloading.native import NativeLink, native_available
from hdp.offloading.streams import CpuStreams, CudaStreams

NUM_TENSORS, NUM_BYTES = 200, 256
SIZES = {"max_bytes": 1 << 28, "slab_bytes": 1 << 24, "num_threads": 2}
WINDOWS = Windows(window_bytes=1 << 16, keep_bytes=1 << 12, prefetch_bytes=1 << 14)
CALLS = ("send", "sent", "fetch", "fetched", "free")


def links(device: torch.device) -> dict[str, Callable[[], Link]]:
    """The links that this machine has, by name."""
    streams = CudaStreams if device.type == "cuda" else lambda device: CpuStreams()
    found: dict[str, Callable[[], Link]] = {"Python": lambda: StreamLink(streams(device), **SIZES)}
    if native_available(device):
        found["C++"] = lambda: NativeLink(device, **SIZES)
    return found


def clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.thread_time()


def link_us(link: Link, repeats: int) -> dict[str, float]:
    """Microseconds of each call."""
    data, out = (
        [torch.zeros(NUM_BYTES, dtype=torch.uint8, device=link.device) for _ in range(NUM_TENSORS)]
        for _ in range(2)
    )
    stream = link.stream()
    times: dict[str, list[float]] = {call: [] for call in CALLS}
    for _ in range(repeats):
        marks = [clock(link.device)]
        blocks = [link.send(x, stream) for x in data]
        marks.append(clock(link.device))
        for block in blocks:
            link.sent(block, stream)
        marks.append(clock(link.device))
        for block, x in zip(blocks, out, strict=True):
            link.fetch(block, x, stream)
        marks.append(clock(link.device))
        for block in blocks:
            link.fetched(block, stream)
        marks.append(clock(link.device))
        for block in blocks:
            link.free(block)
        marks.append(clock(link.device))
        for call, a, b in zip(CALLS, marks[:-1], marks[1:], strict=True):
            times[call].append(1e6 * (b - a) / NUM_TENSORS)
        synchronize(link.device)
    return {call: median(found) for call, found in times.items()}


def chain_us(device: torch.device, engine: OffloadEngine | None, repeats: int) -> list[float]:
    """Microseconds of forward and of backward per operation."""
    times = []
    for _ in range(repeats):
        x = torch.zeros(NUM_BYTES // 4, device=device, requires_grad=True)
        context = nullcontext() if engine is None else engine.forward(Treatment(), min_bytes=1)
        marks = [clock(device)]
        with context:
            y = x
            for _ in range(NUM_TENSORS):
                y = y.sin()
            loss = y.sum()
        marks.append(clock(device))
        loss.backward()
        marks.append(clock(device))
        times.append([1e6 * (marks[1] - marks[0]), 1e6 * (marks[2] - marks[1])])
        synchronize(device)
    return [median(t) / NUM_TENSORS for t in zip(*times, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, repeats: int) -> list[dict[str, float | str]]:
    """A row for each link."""
    plain = chain_us(device, None, repeats)
    rows: list[dict[str, float | str]] = []
    for name, make in links(device).items():
        link = make()
        calls = link_us(link, repeats)
        engine = OffloadEngine(link, windows=WINDOWS)
        times = chain_us(device, engine, repeats)
        forward, backward = (a - b for a, b in zip(times, plain, strict=True))
        engine.close()
        total = forward + backward
        rows.append(
            {
                "name": name,
                **calls,
                "link": sum(calls.values()),
                "forward": forward,
                "backward": backward,
                "total": total,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the collector would walk through all of torch now and then
    rows = measure(device, args.repeats)
    columns = [*CALLS, "link", "forward", "backward"]
    console.print_table(
        ["link in", *columns, "ratio"],
        [
            [
                str(row["name"]),
                *(f"{row[column]:.1f}" for column in columns),
                f"{float(row['total']) / float(rows[0]['total']):.2f}",
            ]
            for row in rows
        ],
        title=f"microseconds of the host per saved tensor that travels ({device.type})",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
