"""Compare attention on the HDP path with the best kernel called directly, in one run.

    python tools/bench_attention.py                     # a GPU: the table of docs/benchmarks.md
    python tools/bench_attention.py --only 128K --repeats 5 --json out.json
    OMP_NUM_THREADS=1 python tools/bench_attention.py --device cpu   # small sizes, as a smoke test

Three kinds of workload, causal, bf16:

    one rank    whole sequences through ring_attn_varlen_func, a ring of one
    ring of 8   the blocks of one rank of 8 in ring order with their merges, compared with 1/8 of
                the whole sequence in one call; peers are emulated (tools/emulated_ring.py), and
                transfers take no time
    packed      many sequences in one call

`direct` rows call the public functions of installed libraries, dense and varlen. Ratios are
relative to the best of these: 1.00 matches the fastest library, above 1 beats it. TFLOP/s count 4
S^2 H D / 2 for forward and 3.5 times that for forward + backward; one rank of a ring counts 1/8.
Times are medians of device events after warm-up, with variants taking turns, random data, and the
L2 cache flushed before each call. Results are checked against each other before timing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hdp import console
from hdp.attention.kernels import choose_kernel
from hdp.attention.layout import RingLayout
from hdp.attention.ring import ring_attn_varlen_func
from hdp.ops import native as ops
from hdp.profile.provenance import code_version

sys.path.insert(0, str(Path(__file__).parent))
from emulated_ring import EmulatedComm, Sequence, ring_layout
from peer_attention import Attend, direct_attention

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
LARGEST_ERROR = 1e-2  # relative, between bf16 results


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sequences, heads, and the goal for the default kernel."""

    name: str
    seqlens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    ring_size: int = 1
    goal: float | None = None  # ratio of forward + backward

    @property
    def forward_flops(self) -> float:
        """Of one rank."""
        pairs = sum(n * n for n in self.seqlens) / 2
        return 4 * pairs * self.heads * self.head_dim / self.ring_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute a workload; `share`: the fraction of its time that counts for one rank."""

    name: str
    attend: Attend
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    share: float = 1.0

    @property
    def is_direct(self) -> bool:
        return self.name.startswith("direct")

    def run(self, backward: bool) -> tuple[Tensor, ...]:
        """out, or (out, dq, dk, dv)."""
        if not backward:
            with torch.no_grad():
                return (self.attend(self.q, self.k, self.v),)
        leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        out = self.attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, self.dout))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant's measurement, in seconds per rank."""

    workload: str
    variant: str
    forward_s: float
    both_s: float
    forward_tflops: float
    both_tflops: float
    forward_ratio: float
    both_ratio: float
    goal: float | None


def workloads(device: str) -> list[Workload]:
    """The workloads for which the project has goals; on a CPU, scaled-down versions."""
    if device == "cpu":
        small = {"heads": 4, "kv_heads": 2, "head_dim": 32}
        return [
            Workload(name="one rank 512", seqlens=(512,), goal=0.97, **small),
            Workload(name="ring of 8, 512", seqlens=(512,), ring_size=8, goal=0.96, **small),
            Workload(name="packed 16 x 32", seqlens=(32,) * 16, goal=0.97, **small),
            Workload(name="packed ragged", seqlens=_ragged(700, 60), **small),
        ]
    result = []
    for label, n in (("8K", 8 << 10), ("32K", 32 << 10), ("128K", 128 << 10)):
        for kv_heads in (32, 8):
            name = f"one rank {label}, {kv_heads} KV heads"
            goal = 0.97 if n == 128 << 10 else None
            result.append(Workload(name=name, seqlens=(n,), kv_heads=kv_heads, goal=goal))
    for label, n in (("32K", 32 << 10), ("128K", 128 << 10)):
        for kv_heads in (32, 8):
            name = f"ring of 8, {label}, {kv_heads} KV heads"
            goal = 0.96 if n == 128 << 10 else None
            result.append(
                Workload(name=name, seqlens=(n,), kv_heads=kv_heads, ring_size=8, goal=goal)
            )
    result.append(Workload(name="packed 128 x 1K", seqlens=(1024,) * 128, goal=0.97))
    result.append(
        Workload(name="packed 128 x 1K, 8 KV heads", seqlens=(1024,) * 128, kv_heads=8, goal=0.97)
    )
    result.append(Workload(name="packed ragged 128K", seqlens=_ragged(128 << 10, 900)))
    return result


def _ragged(total: int, typical: int) -> tuple[int, ...]:
    """Log-normal lengths that add up to `total`, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        draw = float(torch.randn((), generator=generator).mul(1.2).exp()) * typical
        lengths.append(min(left, max(1, int(draw))))
    return tuple(lengths)


# ---- the ways to compute a workload ----


def variants(load: Workload, device: torch.device, ring_rank: int, names: list[str]) -> list:
    """Ours first, then each library alone; `names`: block kernels to time besides the default."""
    torch.manual_seed(0)
    whole = Sequence.random(sum(load.seqlens), load.heads, load.kv_heads, load.head_dim, device)
    tensors = {"q": whole.q, "k": whole.k, "v": whole.v, "dout": whole.dout}
    direct = [
        Variant(name=f"direct {name}", attend=attend, share=1 / load.ring_size, **tensors)
        for name, attend in direct_attention(load.seqlens, device).items()
    ]
    ours = []
    for name in [None, *names]:
        choice = choose_kernel(device, torch.bfloat16, name, head_dim=load.head_dim)
        label = choice.kernel.name
        if load.ring_size == 1:
            layout = RingLayout(local_seqlens=load.seqlens)
            ours.append(_through_ring(f"hdp {label}", layout, None, choice.kernel, tensors))
            continue
        shard = dict(
            zip(("q", "k", "v", "dout"), whole.shard(load.ring_size, ring_rank), strict=True)
        )
        for mode, gathered in (("hdp", False), ("hdp gathered", True)):
            layout = ring_layout(sum(load.seqlens), load.ring_size, ring_rank, gathered=gathered)
            comm = EmulatedComm(whole, layout)
            ours.append(_through_ring(f"{mode} {label}", layout, comm, choice.kernel, shard))
    return ours + direct


def _through_ring(name, layout, comm, kernel, tensors: dict[str, Tensor]) -> Variant:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attn_varlen_func(q, k, v, layout, comm=comm, kernel=kernel)

    copies: dict[str, Any] = {k: v.clone() for k, v in tensors.items()}
    return Variant(name=name, attend=attend, **copies)


# ---- measuring ----


def bench(load: Workload, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time all working variants of a workload; failing ones are reported and left out."""
    names = [] if device.type == "cpu" else args.kernels
    usable = []
    for variant in variants(load, device, args.ring_rank, names):
        try:
            variant.run(backward=True)
            usable.append(variant)
        except Exception as error:
            console.note(f"{load.name}: {variant.name} fails: {str(error).splitlines()[0]}")
    check(load, usable, args.ring_rank)
    forward, both = (time_all(usable, backward, args.repeats, device) for backward in (False, True))
    rivals = [v for v in usable if v.is_direct]
    best = [min(times[v.name] for v in rivals) for times in (forward, both)]
    flops = load.forward_flops
    return [
        Row(
            workload=load.name,
            variant=v.name,
            forward_s=forward[v.name],
            both_s=both[v.name],
            forward_tflops=flops / forward[v.name] / 1e12,
            both_tflops=3.5 * flops / both[v.name] / 1e12,
            forward_ratio=best[0] / forward[v.name],
            both_ratio=best[1] / both[v.name],
            goal=load.goal if v is usable[0] else None,
        )
        for v in usable
    ]


def check(load: Workload, usable: list[Variant], ring_rank: int) -> None:
    """Assert that every variant's out and dq match those of the first direct variant."""
    reference = next(v for v in usable if v.is_direct).run(backward=True)[:2]
    for variant in usable:
        for name, got, want in zip(
            ("out", "dq"), variant.run(backward=True)[:2], reference, strict=True
        ):
            if len(got) < len(want):
                chunks = ring_layout(len(want), load.ring_size, ring_rank).spans()
                want = torch.cat([want[start:stop] for _, start, stop in chunks])
            error = ((got - want).float().norm() / want.float().norm()).item()
            assert error < LARGEST_ERROR, f"{load.name}, {variant.name}: {name} off by {error:.1e}"


def time_all(
    usable: list[Variant], backward: bool, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds per rank by variant; variants take turns, so noise affects all alike."""
    seconds: dict[str, list[float]] = {v.name: [] for v in usable}
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, device=device)
    for repeat in range(-2, repeats):
        for variant in usable:
            flush.zero_()
            took = _time_once(partial(variant.run, backward), device)
            if repeat >= 0:
                seconds[variant.name].append(took * variant.share)
    return {name: median(values) for name, values in seconds.items()}


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


# ---- the report ----


def report(rows: list[Row], device: torch.device) -> None:
    columns = ["workload", "variant", "fwd ms", "TFLOP/s", "fwd+bwd ms", "TFLOP/s", "fwd", "ratio"]
    table = [
        [
            row.workload,
            row.variant,
            f"{row.forward_s * 1e3:.3f}",
            f"{row.forward_tflops:.1f}",
            f"{row.both_s * 1e3:.3f}",
            f"{row.both_tflops:.1f}",
            f"{row.forward_ratio:.3f}",
            f"{row.both_ratio:.3f}" + (f" of {row.goal}" if row.goal else ""),
        ]
        for row in rows
    ]
    console.print_table([*columns], table, title=header(device))


def header(device: torch.device) -> str:
    """The table title: hardware, software and commit."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"{where}, torch {torch.__version__}, merges by {ops.describe(device.type)[0]}, "
        f"{code_version()}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ring-rank", type=int, default=3, help="which rank of 8 is emulated")
    parser.add_argument(
        "--kernels", nargs="*", default=[], help="block kernels to time besides the default one"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows: list[Row] = []
    for load in workloads(device.type):
        if args.only in load.name:
            rows += bench(load, args, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report(rows, device)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    missed = [row for row in rows if row.goal and row.both_ratio < row.goal]
    for row in missed:
        console.note(f"{row.workload}, {row.variant}: {row.both_ratio:.3f}, goal {row.goal}")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
