"""Compare the ops of csrc/ with plain torch and with memory bandwidth, in one run.

    OMP_NUM_THREADS=1 python tools/bench_ops.py           # CPU
    python tools/bench_ops.py --device cuda --compile     # a GPU: sizes of a 128K-token sequence
    python tools/bench_ops.py --markdown --only merge

All ops here are memory-bound, so their minimum time is the bytes they must move (each input read
once, each output written once) divided by the bandwidth of a large copy on this machine. `of copy`
is that minimum over the measured time: 100% matches a copy too large for any cache (on a CPU, small
cases fit in a cache and exceed it). `index` picks rows as one would without these ops, by a tensor
of row numbers on the device.

Times are medians over random inputs, with variants taking turns. Tensors that an op overwrites are
restored before each repetition, outside the measured time. Each variant's result is checked against
the first variant's before timing. On a CPU with one thread, that thread's CPU time is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdp import console
from hdp.doctor.machine import cpu_name
from hdp.models.logprobs import chunked_logprobs
from hdp.ops import native as ops
from hdp.ops import reference
from hdp.profile.provenance import code_version
from hdp.scheduler.render.text import markdown

Run = Callable[[], Any]
WARM_UP = 3  # repetitions that do not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op on one input; `variants` maps names to the functions to time."""

    name: str
    shape: str
    num_bytes: int  # minimum to move; 0: not memory-bound
    variants: dict[str, Run]
    reset: Run = field(default=lambda: None)  # before each repetition, not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    if args.device not in ops.LIBRARY.devices:
        sys.exit("nothing to compare: {} ({})".format(*ops.describe(args.device)))
    device = torch.device(args.device)
    torch.manual_seed(0)
    print(environment(device))
    bytes_per_s = copy_speed(device, args.repeats)
    print(f"a large copy: {bytes_per_s / 1e9:,.1f} GB/s, counting reads and writes\n")
    columns = ["op", "shape", "variant", "ms", "GB/s", "of copy", "speedup"]
    rows = []
    for case in cases(device, args.compile):
        if args.only in case.name:
            rows += measure(case, device, bytes_per_s, args.repeats)
    print(markdown([columns, *rows]) if args.markdown else console.table_text(columns, rows))


def measure(case: Case, device: torch.device, bytes_per_s: float, repeats: int) -> list[list[str]]:
    """One row per variant; speedup is over the first."""
    taken: dict[str, list[float]] = {name: [] for name in case.variants}
    for _ in range(repeats + WARM_UP):  # in turn, so noise affects all alike
        for name, run in case.variants.items():
            case.reset()
            taken[name].append(seconds(run, device))
    times = {name: statistics.median(each[WARM_UP:]) for name, each in taken.items()}
    first = next(iter(times.values()))
    return [
        [
            *((case.name, case.shape) if i == 0 else ("", "")),
            name,
            f"{1e3 * time_s:.3f}",
            f"{case.num_bytes / time_s / 1e9:.1f}" if case.num_bytes else "-",
            f"{case.num_bytes / bytes_per_s / time_s:.0%}" if case.num_bytes else "-",
            f"{first / time_s:.2f}x",
        ]
        for i, (name, time_s) in enumerate(times.items())
    ]


# ---- cases ----


def cases(device: torch.device, compiled: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    rows, heads, dim = (16384, 32, 128) if gpu else (2048, 32, 128)
    for block_dtype in (torch.bfloat16, torch.float32):
        for num_spans in (1, 16):
            yield merge_case(device, rows, heads, dim, block_dtype, num_spans, compiled)
    yield from rows_cases(device, rows, heads, dim)
    tokens, vocabularies = (4096, (128256,)) if gpu else (128, (32000, 128256))
    for vocab in vocabularies:
        for dtype in (torch.float32, torch.bfloat16):
            yield from cross_entropy_cases(device, tokens, vocab, dtype, compiled)
    yield loss_case(device, *((8192, 4096, 128256) if gpu else (256, 256, 32000)))


def late_halves(rows: int, num_spans: int) -> list[tuple[int, int]]:
    """The late chunk of each of `num_spans` packed sequences, as used in a ring step."""
    size = rows // num_spans
    return [(i * size + size // 2, (i + 1) * size) for i in range(num_spans)]


def merge_case(
    device: torch.device,
    rows: int,
    heads: int,
    dim: int,
    block_dtype: torch.dtype,
    num_spans: int,
    compiled: bool,
) -> Case:
    spans = late_halves(rows, num_spans)
    index = torch.cat([torch.arange(*span) for span in spans]).to(device)
    packed = len(index)
    out, lse = torch.randn(rows, heads, dim, device=device), torch.randn(heads, rows, device=device)
    block_out = torch.randn(packed, heads, dim, device=device).to(block_dtype)
    block_lse = torch.randn(heads, packed, device=device)
    merge = torch.compile(reference.merge, dynamic=False) if compiled else reference.merge

    def by_index(merge: Callable = reference.merge) -> None:
        merged = merge(out.index_select(0, index), lse.index_select(1, index), block_out, block_lse)
        out.index_copy_(0, index, merged[0])
        lse.index_copy_(1, index, merged[1])

    def by_view(merge: Callable = reference.merge) -> None:
        view, view_lse = out[spans[0][0] :], lse[:, spans[0][0] :]
        merged = merge(view, view_lse, block_out, block_lse)
        view.copy_(merged[0])
        view_lse.copy_(merged[1])

    eager = by_view if num_spans == 1 else by_index
    variants: dict[str, Run] = {"eager": eager}
    if compiled:
        variants["torch.compile"] = lambda: eager(merge)
    variants["csrc"] = lambda: ops.merge_lse_(out, lse, block_out, block_lse, spans)
    moved = packed * heads * (dim * (4 + 4 + block_out.element_size()) + 12)
    kept = out.clone(), lse.clone()

    def reset() -> None:
        out.copy_(kept[0])
        lse.copy_(kept[1])

    def result(run: Run) -> Tensor:
        reset()
        run()
        return torch.cat([out.flatten(), lse.flatten()])

    check(variants, result, 1e-5)
    shape = f"{packed}x{heads}x{dim} {short(block_dtype)}, spans: {num_spans}"
    return Case(name="merge", shape=shape, num_bytes=moved, variants=variants, reset=reset)


def rows_cases(device: torch.device, rows: int, heads: int, dim: int) -> Iterator[Case]:
    """16 spans of queries (dim 0), of keys and values (dim 1), and gradients added to fp32.

    Gradients also with a single span, because torch's addition of bf16 to fp32 is not vectorized.
    """
    spans = late_halves(rows, 16)
    index = torch.cat([torch.arange(*span) for span in spans]).to(device)
    shape = f"{len(index)} of {rows} rows x{heads}x{dim}"
    q = torch.randn(rows, heads, dim, device=device).bfloat16()
    kv = torch.randn(2, rows, 8, dim, device=device).bfloat16()
    for name, x, axis in (("gather q", q, 0), ("gather kv", kv, 1)):
        variants: dict[str, Run] = {
            "index": partial(x.index_select, axis, index),
            "cat": partial(reference.gather_rows_reference, x, spans, axis),
            "csrc": partial(ops.gather_rows, x, spans, axis),
        }
        check(variants, lambda run: run(), 0)
        moved = 2 * x.numel() * x.element_size() * len(index) // rows
        case_shape = f"{shape} bf16" if axis == 0 else f"2x{len(index)}x8x{dim} bf16"
        yield Case(name=name, shape=case_shape, num_bytes=moved, variants=variants)

    for added in ([(rows // 2, rows)], spans):
        yield add_case(device, rows, heads, dim, added)


def add_case(
    device: torch.device, rows: int, heads: int, dim: int, spans: list[tuple[int, int]]
) -> Case:
    index = torch.cat([torch.arange(*span) for span in spans]).to(device)
    total = torch.zeros(rows, heads, dim, device=device)
    values = torch.randn(len(index), heads, dim, device=device).bfloat16()
    variants: dict[str, Run] = {
        "index": lambda: total.index_add_(0, index, values.to(total.dtype)),
        "views": partial(reference.scatter_rows_reference_, total, values, spans, 0, True),
        "csrc": partial(ops.scatter_rows_, total, values, spans, accumulate=True),
    }

    def result(run: Run) -> Tensor:
        total.zero_()
        run()
        return total.clone()

    check(variants, result, 1e-6)
    return Case(
        name="add rows",
        shape=f"{len(index)}x{heads}x{dim} bf16 to fp32, spans: {len(spans)}",
        num_bytes=values.numel() * (4 + 4 + 2),
        variants=variants,
        reset=total.zero_,
    )


def cross_entropy_cases(
    device: torch.device, tokens: int, vocab: int, dtype: torch.dtype, compiled: bool
) -> Iterator[Case]:
    kept = torch.randn(tokens, vocab, device=device).mul_(3).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    logits = kept.clone()
    lse = reference.softmax_cross_entropy_reference(kept, labels)[1]
    grad = torch.rand(tokens, device=device)
    shape = f"{tokens}x{vocab} {short(dtype)}"
    forward: dict[str, Run] = {
        "eager": lambda: reference.softmax_cross_entropy_reference(kept, labels),
        "F.cross_entropy": lambda: (-F.cross_entropy(kept.float(), labels, reduction="none"), lse),
    }
    if compiled:
        fused = torch.compile(reference.softmax_cross_entropy_reference, dynamic=False)
        forward["torch.compile"] = lambda: fused(kept, labels)
    forward["csrc"] = lambda: ops.softmax_cross_entropy(kept, labels)
    check(forward, lambda run: torch.cat(run()), 2e-5)
    moved = kept.numel() * kept.element_size()
    yield Case(name="cross-entropy forward", shape=shape, num_bytes=moved, variants=forward)

    def backward(run: Callable, grad_dtype: torch.dtype) -> Tensor:
        return run(logits, labels, lse, grad, softcap=None, grad_dtype=grad_dtype)

    for to in (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,):
        variants: dict[str, Run] = {
            "eager": partial(backward, reference.softmax_cross_entropy_backward_reference_, to),
            "csrc": partial(backward, ops.softmax_cross_entropy_backward_, to),
        }

        def result(run: Run) -> Tensor:
            logits.copy_(kept)
            return run().float()

        check(variants, result, 1e-2 if to == torch.bfloat16 else 1e-5)
        yield Case(
            name="cross-entropy backward",
            shape=f"{shape} to {short(to)}",
            num_bytes=kept.numel() * (kept.element_size() + to.itemsize),
            variants=variants,
            reset=lambda: logits.copy_(kept),
        )


def loss_case(device: torch.device, tokens: int, hidden_size: int, vocab: int) -> Case:
    """logprobs.py forward and backward, including matmuls, with and without csrc."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, weight = (
        torch.randn(n, hidden_size, device=device).div_(hidden_size**0.25).to(dtype)
        for n in (tokens, vocab)
    )
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)
    library, nothing = ops.LIBRARY, dataclasses.replace(ops.LIBRARY, devices=frozenset())

    def step(used: ops.Library) -> Tensor:
        ops.LIBRARY = used
        try:
            loss = chunked_logprobs(hidden, weight, labels).sum()
            grads = torch.autograd.grad(loss, (hidden, weight))
        finally:
            ops.LIBRARY = library
        return torch.cat([x.flatten().float() for x in grads])

    variants: dict[str, Run] = {"eager": partial(step, nothing), "csrc": partial(step, library)}
    check(variants, lambda run: run(), 1e-2 if dtype == torch.bfloat16 else 1e-5)
    shape = f"{tokens}x{hidden_size}x{vocab} {short(dtype)}"
    return Case(name="loss, forward and backward", shape=shape, num_bytes=0, variants=variants)


# ---- measuring ----


def seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    # With a single thread, its CPU time: other work on the machine does not count.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


def copy_speed(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    x = torch.empty(size, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    taken = [seconds(lambda: y.copy_(x), device) for _ in range(repeats + WARM_UP)]
    return 2 * size / statistics.median(taken[WARM_UP:])


def check(variants: dict[str, Run], result: Callable[[Run], Tensor], tolerance: float) -> None:
    """Assert that every variant computes the same as the first."""
    results = {name: result(run) for name, run in variants.items()}
    want = next(iter(results.values()))
    for name, got in results.items():
        error = ((got - want).double().norm() / want.double().norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


def short(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).split(".")[1]]


def environment(device: torch.device) -> str:
    """Command, hardware, versions and commit of this run."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} thread"
    command = " ".join(["python", "tools/bench_ops.py", *sys.argv[1:]])
    return f"{command}\n{hardware}; torch {torch.__version__}; {code_version()}"


if __name__ == "__main__":
    main()
