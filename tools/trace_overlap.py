"""Trace a ring and measure the share of key and value transfers hidden behind attention.

    torchrun --standalone --nproc-per-node 8 tools/trace_overlap.py     # a ring over GPUs, NCCL
    python tools/trace_overlap.py                                       # one GPU, peers emulated
    python tools/trace_overlap.py --gathered --tokens 32768

One forward and backward of ring attention under torch's profiler, after warm-up. Writes a Chrome
trace (`--out`, open it in Perfetto) and prints, for rank 0:

    transfers     device time during which a transfer runs
    overlapped    the part of it during which a compute kernel also runs
    before first  compute time before the first transfer ended: the first block does not wait

On one GPU, a device copy on a separate stream stands in for NCCL, with the same rules: it starts
after previously queued work, and `wait()` blocks the stream, not the host (tools/emulated_ring.py).
Unlike NVLink, it shares memory bandwidth with the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdp.attention.comm import RingComm
from hdp.attention.ring import ring_attn_varlen_func

sys.path.insert(0, str(Path(__file__).parent))
import emulated_ring

WARM_UP = 3
_CPU_TOKENS = 16 << 10  # a minute or two
Interval = tuple[float, float]  # start, end, microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Overlap found in a trace, in microseconds of device time."""

    transfers_us: float
    overlapped_us: float  # transfers while a compute kernel runs
    before_first_us: float  # compute before the first transfer ends

    @property
    def hidden(self) -> float:
        """Share of the transfers that overlapped with compute."""
        return self.overlapped_us / self.transfers_us if self.transfers_us else 0.0


def read_trace(trace: dict[str, Any]) -> Overlap:
    """The overlap in a Chrome trace of torch's profiler."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    transfers, compute = split(events)
    moving, busy = union(map(_interval, transfers)), union(map(_interval, compute))
    first_end = min((_interval(e)[1] for e in transfers), default=0.0)
    return Overlap(
        transfers_us=length(moving),
        overlapped_us=length(common(moving, busy)),
        before_first_us=length(common(busy, [(float("-inf"), first_end)])),
    )


def split(events: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(transfers, compute): NCCL kernels, or all work outside the busiest stream; other kernels."""
    transfers = [e for e in events if "nccl" in e["name"].lower()]
    kernels = [e for e in events if e["cat"] == "kernel" and e not in transfers]
    if transfers:
        return transfers, kernels
    busy_us: dict[int, float] = {}
    for event in kernels:
        stream = event["args"]["stream"]
        busy_us[stream] = busy_us.get(stream, 0.0) + event["dur"]
    main = max(busy_us, key=lambda stream: busy_us[stream], default=None)
    others = [e for e in events if e["args"]["stream"] != main]
    return others, [e for e in kernels if e["args"]["stream"] == main]


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Sequence[Interval] | Any) -> list[Interval]:
    """The union of intervals, as sorted, disjoint intervals."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """The intersection of two lists of sorted, disjoint intervals."""
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return [(start, end) for start, end in pairs if start < end]


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def trace_ring(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """The profiler's trace of one forward and backward of `rank`."""
    torch.manual_seed(0)
    sequence = emulated_ring.Sequence.random(
        args.tokens, args.heads, args.kv_heads, args.head_dim, device
    )
    emulated = world == 1
    ring_size = args.ring_size if emulated else world
    position = min(args.ring_rank, ring_size - 1) if emulated else rank
    layout = emulated_ring.ring_layout(args.tokens, ring_size, position, gathered=args.gathered)
    comm: RingComm
    if emulated:
        comm = emulated_ring.EmulatedComm(sequence, layout, copies=device.type == "cuda")
    else:
        comm = RingComm(None, device)
    q, k, v, dout = sequence.shard(ring_size, position)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        out = ring_attn_varlen_func(leaves[0], leaves[1], leaves[2], layout, comm=comm)
        torch.autograd.grad(out, leaves, dout)
        comm.take_stats()

    return profiled(step, args.out.with_suffix(f".{rank}.json"), device)


def profiled(step: Callable[[], None], path: Path, device: torch.device) -> dict:
    """The Chrome trace of `step`, written to `path` and read back."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=128 << 10, help="length of the whole sequence"
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ring-size", type=int, default=8, help="with emulated peers")
    parser.add_argument("--ring-rank", type=int, default=3, help="which rank to run")
    parser.add_argument("--gathered", action="store_true", help="gather mode (gather.py)")
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and args.tokens > _CPU_TOKENS:
        parser.error(f"{args.tokens} tokens need a GPU; on a CPU at most --tokens {_CPU_TOKENS}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        dist.barrier()
    overlap = read_trace(trace_ring(args, rank, world, device))
    if rank == 0 and args.json:
        print(json.dumps(asdict(overlap) | {"hidden": overlap.hidden}))
    elif rank == 0:
        print(
            f"transfers {overlap.transfers_us / 1e3:.2f} ms, overlapped with compute "
            f"{overlap.overlapped_us / 1e3:.2f} ms = {overlap.hidden:.1%}, compute before the end "
            f"of the first transfer {overlap.before_first_us / 1e3:.2f} ms; {args.out.stem}.*.json"
        )
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
