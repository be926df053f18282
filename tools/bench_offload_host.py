"""Host time of offload: what Python spends per saved tensor, by what happens to the tensor.

    OMP_NUM_THREADS=1 python tools/bench_offload_host.py      # CPU time of this thread
    python tools/bench_offload_host.py --device cuda          # wall time of kernels that are tiny

Tensors have 256 bytes, so that only the bookkeeping counts. A chain of operations that each save
one tensor, less the same chain without offload, in microseconds per tensor:

    forward, backward    of the engine, its link included
    link                 of the link alone: send, sent, fetch, fetched and free, called directly

Medians; on a CPU by the clock of the thread, which other work on the machine does not touch. The
CPU's streams cost nothing: on a GPU torch's events and copies come on top.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import nullcontext
from statistics import median

import torch
from torch import Tensor

from hdp import console
from hdp.offloading.engine import OffloadEngine
from hdp.offloading.link import Link
from hdp.offloading.streams import CpuStreams, CudaStreams
from hdp.offloading.types import ActivationPolicy, CopyBuffers

NUM_TENSORS, NUM_BYTES = 200, 256
SIZES = {"max_bytes": 1 << 28, "slab_bytes": 1 << 24, "num_threads": 2}
BUFFERS = CopyBuffers(send_bytes=1 << 16, keep_bytes=1 << 12, prefetch_bytes=1 << 14)
POLICIES = {
    "travels": ActivationPolicy(),
    "stays": ActivationPolicy(ratio=0.0),
    "half is recomputed": ActivationPolicy(ratio=0.0, recompute_pointwise=0.5),
}


def open_link(device: torch.device) -> Link:
    return Link(CudaStreams(device) if device.type == "cuda" else CpuStreams(), **SIZES)


def clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.thread_time()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_us(link: Link, repeats: int) -> float:
    """Microseconds of one tensor's way out and back."""
    data, stream, times = _bytes(link.device), link.stream(), []
    for _ in range(repeats):
        out = _bytes(link.device)
        began = clock(link.device)
        blocks = [link.send(x, stream) for x in data]
        for block in blocks:
            link.sent(block, stream)
        for block, x in zip(blocks, out, strict=True):
            link.fetch(block, x, stream)
        for block in blocks:
            link.fetched(block, stream)
            link.free(block)
        times.append(1e6 * (clock(link.device) - began) / NUM_TENSORS)
        synchronize(link.device)
    return median(times)


def _bytes(device: torch.device) -> list[Tensor]:
    new = torch.zeros(NUM_TENSORS, NUM_BYTES, dtype=torch.uint8, device=device)
    return list(new.unbind())


def chain_us(
    device: torch.device, engine: OffloadEngine | None, policy: ActivationPolicy, repeats: int
) -> tuple[float, float]:
    """Microseconds of forward and of backward per operation."""
    forwards, backwards = [], []
    for _ in range(repeats):
        x = torch.zeros(NUM_BYTES // 4, device=device, requires_grad=True)
        context = nullcontext() if engine is None else engine.forward(policy, min_bytes=1)
        began = clock(device)
        with context:
            y = x
            for _ in range(NUM_TENSORS):
                y = y.sin()
            loss = y.sum()
        middle = clock(device)
        loss.backward()
        forwards.append(1e6 * (middle - began) / NUM_TENSORS)
        backwards.append(1e6 * (clock(device) - middle) / NUM_TENSORS)
        synchronize(device)
    return median(forwards), median(backwards)


def measure(device: torch.device, repeats: int) -> dict[str, tuple[float, float]]:
    """Microseconds of forward and backward per tensor, by what happens to it; the link's last."""
    plain = chain_us(device, None, ActivationPolicy(), repeats)
    found = {}
    for name, policy in POLICIES.items():
        engine = OffloadEngine(open_link(device), buffers=BUFFERS)
        forward, backward = chain_us(device, engine, policy, repeats)
        found[name] = (forward - plain[0], backward - plain[1])
        engine.close()
    link = open_link(device)
    found["link"] = (link_us(link, repeats), 0.0)
    link.close()
    return found


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
    found = measure(device, args.repeats)
    gc.unfreeze()
    link, _ = found.pop("link")
    console.print_table(
        ["a saved tensor", "forward us", "backward us", "link us"],
        [
            [name, f"{forward:.0f}", f"{backward:.0f}", f"{link:.0f}" if name == "travels" else "-"]
            for name, (forward, backward) in found.items()
        ],
        title=f"host time per saved tensor ({device.type})",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
