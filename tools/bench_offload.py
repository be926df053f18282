"""Activation offload beside recomputing and beside other libraries' offload, in one run.

    python tools/bench_offload.py                       # a GPU: the table of docs/benchmarks.md
    python tools/bench_offload.py --lengths             # host memory held over 50 steps
    python tools/bench_offload.py --only 128K --json offload.json
    OMP_NUM_THREADS=1 python tools/bench_offload.py --device cpu --tiny    # the logic

Llama-7B-shaped layers (tools/decoder_layers.py), bf16, one sequence, forward + backward:

    nothing          everything that autograd saves stays
    recompute        torch's activation checkpoints, every layer
    TRL, torch       OffloadActivations if trl is installed, save_on_cpu (tools/peer_offload.py)
    hdp planned      keep, send or recompute as scheduler/costs/activation_plan.py decides for the
                     memory of `recompute`; where the measured peak is above it, planned for less
    hdp R, hdp R+P   a share R of all bytes, or of what is not element-wise (that is recomputed)

Times are medians of device events after a first step, whose extra seconds (host memory, kernels,
recipes verified) have a column. Peak is what a step takes beyond weights, gradients and input.
Gradients are compared bit by bit with those of `nothing`, under deterministic kernels. A row that
fails, of memory or anything else, says so and the others go on. Goals are the project's, and a row
that has one says whether it is met. On a CPU times and peaks say nothing about a link: there the
gradients, the bytes and the pool count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: determinism

import torch

from hdp import console
from hdp.attention.kernels import choose_kernel
from hdp.offloading.per_microbatch import policy_of
from hdp.offloading.types import ActivationPolicy, CopyBuffers

sys.path.insert(0, str(Path(__file__).parent))
from bench_attention import header
from decoder_layers import LLAMA_7B, TINY, Shape
from offload_budget import Budget, open_bench_engine, plan_for_memory, saved_bytes
from offload_steps import Measured, Steps, clean, measure
from peer_offload import StepContext, peer_offloads, pinned_bytes

GB = 1e9
HELD_GOAL = 1.25  # host memory held over the most in use at once
FIRST_STEP_GOAL_S = 3.0
PLANNED = "hdp planned"
PLANS = 4  # each corrected by the peak that the one before had
RATIOS = ((1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.7, 1.0), (0.4, 1.0))  # with pointwise
MIN_BYTES = {"cuda": 1 << 20, "cpu": 1024}  # smaller tensors stay
Result = tuple[Measured, dict]  # with fields of Row
Variant = Callable[[], Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Layers and tokens. most_ratio: the goal for `hdp planned`, in times of `nothing`; None: no
    slower than recompute."""

    name: str
    tokens: int
    num_layers: int
    most_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to train a setup. Bytes are of one step; None: not known here."""

    setup: str
    variant: str
    seconds: float | None = None
    ratio: float | None = None  # to nothing
    peak_bytes: float | None = None
    sent_bytes: float | None = None
    kept_bytes: float | None = None
    recomputed_bytes: float | None = None
    held_bytes: float | None = None
    in_use_bytes: float | None = None
    first_s: float | None = None  # the first step beyond the others
    exact: bool | None = None
    goal: str = ""  # "met", or what was missed
    failed: str = ""


def setups(tiny: bool) -> list[Setup]:
    if tiny:
        return [
            Setup(name="tiny 96 x 3", tokens=96, num_layers=3),
            Setup(name="tiny 256 x 3", tokens=256, num_layers=3, most_ratio=1.12),
        ]
    kilo = 1024
    return [
        Setup(name="32K x 3", tokens=32 * kilo, num_layers=3),
        Setup(name="64K x 3", tokens=64 * kilo, num_layers=3, most_ratio=1.12),
        Setup(name="128K x 2", tokens=128 * kilo, num_layers=2, most_ratio=1.05),
        Setup(name="128K x 3", tokens=128 * kilo, num_layers=3, most_ratio=1.05),
    ]


# ---- the variants of a setup ----


class Bench:
    """All variants of a setup, one after the other; `rows` has one for each."""

    def __init__(self, setup: Setup, shape: Shape, args: argparse.Namespace) -> None:
        self.setup, self.shape, self.args = setup, shape, args
        self.device = torch.device(args.device)
        kernel = choose_kernel(self.device, torch.bfloat16, head_dim=shape.head_dim).kernel
        self.steps = Steps(shape, setup.num_layers, setup.tokens, self.device, kernel)
        self.rows: list[Row] = []
        self.plain: Measured | None = None

    def run(self) -> list[Row]:
        model = self.steps.model
        row, self.plain = self._row("nothing", self._plainly)
        self.rows.append(row)
        model.recompute = True
        row, recompute = self._row("recompute", self._plainly)
        self.rows.append(row)
        model.recompute = False
        for name, make in peer_offloads(model, self.device).items():
            self.rows.append(self._row(name, partial(self._peer, make))[0])
        if self.plain is not None and recompute is not None:
            self.rows.append(self._planned(self.plain, recompute))
        for ratio, pointwise in RATIOS:
            policy = ActivationPolicy(ratio=ratio, recompute_pointwise=pointwise)
            name = f"hdp {ratio:g}" + ("+P" if pointwise else "")
            self.rows.append(self._row(name, partial(self._ours, policy, None))[0])
        return self.rows

    def _row(self, name: str, run: Variant) -> tuple[Row, Measured | None]:
        """A variant's row; where it fails, with the reason in place of figures."""
        row = Row(setup=self.setup.name, variant=name)
        clean(self.device)
        try:
            measured, fields = run()
        except Exception as error:  # whatever it is, the other rows are of use
            first = (str(error) or "no message").splitlines()[0]
            console.note(f"{row.setup}, {name}: {type(error).__name__}: {first}")
            return replace(row, failed=f"{type(error).__name__}: {first}"), None
        finally:
            clean(self.device)
        plain = self.plain or (measured if name == "nothing" else None)
        exact = ratio = None
        if plain is not None:
            pairs = zip(measured.gradients, plain.gradients, strict=True)
            exact = all(torch.equal(a, b) for a, b in pairs)
            ratio = measured.seconds / plain.seconds
        row = replace(
            row,
            seconds=measured.seconds,
            ratio=ratio,
            peak_bytes=measured.peak_bytes,
            first_s=measured.first_s,
            exact=exact,
            **fields,
        )
        return row, measured

    def _plainly(self) -> Result:
        return measure(self.steps, lambda: (nullcontext(), nullcontext()), self.args.repeats), {}

    def _peer(self, make: StepContext) -> Result:
        measured = measure(self.steps, lambda: (nullcontext(), make()), self.args.repeats)
        held, in_use = pinned_bytes(self.device)
        return measured, {"held_bytes": held, "in_use_bytes": in_use}

    def _ours(self, policy: ActivationPolicy, buffers: CopyBuffers | None) -> Result:
        engine = open_bench_engine(self.device, buffers)
        min_bytes = MIN_BYTES[self.device.type]

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return engine.forward(policy, min_bytes=min_bytes), nullcontext()

        try:
            measured = measure(self.steps, contexts, self.args.repeats)
            counts, stats = engine.counts, engine.stats()
            if stats.in_use_bytes:
                raise AssertionError(f"{stats.in_use_bytes} bytes of host memory leaked")
        finally:
            engine.close()
        return measured, {
            "sent_bytes": counts.sent / measured.num_steps,
            "kept_bytes": counts.kept / measured.num_steps,
            "recomputed_bytes": counts.recomputed / measured.num_steps,
            "held_bytes": stats.held_bytes,
            "in_use_bytes": stats.peak_in_use_bytes,
        }

    def _planned(self, plain: Measured, recompute: Measured) -> Row:
        """Planned for recompute's memory; again for less where the measured peak is above it."""
        budget = Budget.of_recompute(self.shape, self.setup.tokens, self.setup.num_layers)
        bytes_per_s = self.args.link_gb * GB
        if self.device.type == "cpu":  # as if a third of what is saved fitted behind forward
            num_bytes = saved_bytes(self.shape, self.setup.tokens, self.setup.num_layers)
            bytes_per_s = num_bytes / (3 * plain.forward_s)
        last: Row | None = None
        for _ in range(PLANS):

            def run(budget: Budget = budget) -> Result:
                plan = plan_for_memory(
                    budget,
                    self.shape,
                    forward_s=plain.forward_s,
                    backward_s=plain.seconds - plain.forward_s,
                    host_bytes_per_s=bytes_per_s,
                )
                policy, buffers = policy_of(plan)
                stay = f"{budget.device_bytes / GB:.3g} GB stay"
                console.note(f"{self.setup.name}, planned: {stay}, {policy}")
                return self._ours(policy, buffers)

            row, measured = self._row(PLANNED, run)
            if measured is None:  # no plan for so little, or a fault: the row before stands
                return last or row
            last = replace(row, goal=verdict(row, self.setup, recompute))
            excess = (measured.peak_bytes or 0.0) - (recompute.peak_bytes or 0.0)
            if excess <= 0:
                break
            budget = replace(budget, device_bytes=budget.device_bytes - 1.05 * excess)
        assert last is not None
        return last


def verdict(row: Row, setup: Setup, recompute: Measured) -> str:
    """ "met", or each goal that was missed. On a CPU there is one: the gradients."""
    assert row.seconds is not None and row.ratio is not None
    if row.peak_bytes is None or recompute.peak_bytes is None:
        return "gradients met" if row.exact else "missed: gradients differ"
    missed = []
    most_s = recompute.seconds
    if setup.most_ratio is not None:
        most_s = setup.most_ratio * row.seconds / row.ratio
    if row.seconds > most_s:
        missed.append(f"{row.seconds / most_s:.2f} of the time allowed")
    if row.peak_bytes > recompute.peak_bytes:
        missed.append(f"{row.peak_bytes / recompute.peak_bytes:.2f} of recompute's memory")
    if row.first_s is not None and row.first_s > FIRST_STEP_GOAL_S:
        missed.append(f"first step {row.first_s:.1f} s longer")
    if row.exact is False:
        missed.append("gradients differ")
    return "met" if not missed else "missed: " + ", ".join(missed)


# ---- host memory over many steps ----


def random_lengths(shape: Shape, args: argparse.Namespace) -> dict[str, float]:
    """Steps of random lengths, ratios and numbers of live microbatches: what the pool holds."""
    device, choose = torch.device(args.device), random.Random(0)
    kernel = choose_kernel(device, torch.bfloat16, head_dim=shape.head_dim).kernel
    longest = 512 if args.tiny else 48 << 10
    steps = Steps(shape, 2, longest, device, kernel)
    engine = open_bench_engine(device, None, num_bytes=2 * saved_bytes(shape, longest, 2))
    try:
        for _ in range(args.steps):
            waiting = []
            live = choose.randint(1, 3)
            for _ in range(choose.randint(1, 4)):
                policy = ActivationPolicy(
                    ratio=choose.random(), recompute_pointwise=choose.choice((0.0, 1.0))
                )
                forward = engine.forward(policy, min_bytes=MIN_BYTES[device.type])
                waiting.append(steps.forward(forward, choose.randint(longest // 16, longest)))
                if len(waiting) == live:
                    steps.backward(waiting.pop(0))
            while waiting:
                steps.backward(waiting.pop(0))
        stats = engine.stats()
        return {
            "steps": args.steps,
            "held_bytes": stats.held_bytes,
            "most_in_use_bytes": stats.peak_in_use_bytes,
            "in_use_bytes": stats.in_use_bytes,
            "ratio": stats.held_bytes / stats.peak_in_use_bytes,
        }
    finally:
        engine.close()


# ---- the report ----


def report(rows: list[Row], args: argparse.Namespace) -> None:
    scale, unit = (1e6, "MB") if args.tiny else (GB, "GB")
    columns = [
        *("setup", "variant", "ms", "ratio", f"peak {unit}", "sent", "kept", "recomputed"),
        *("host held", "in use", "first s", "exact", "goal"),
    ]
    sizes = [f"{name}_bytes" for name in ("peak", "sent", "kept", "recomputed", "held", "in_use")]
    table = []
    for row in rows:
        times = [
            "-" if row.seconds is None else f"{1e3 * row.seconds:.1f}",
            "-" if row.ratio is None else f"{row.ratio:.3f}",
        ]
        values = [getattr(row, name) for name in sizes]
        exact = "-" if row.exact is None else "yes" if row.exact else "NO"
        table.append(
            [
                *(row.setup, row.variant, *times),
                *("-" if value is None else f"{value / scale:.2f}" for value in values),
                "-" if row.first_s is None else f"+{row.first_s:.2f}",
                *(exact, row.failed or row.goal or "-"),
            ]
        )
    console.print_table(columns, table, title=header(torch.device(args.device)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", default="", help="setups whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--link-gb", type=float, default=50.8, help="GB/s each way, for plans")
    parser.add_argument("--lengths", action="store_true", help="random lengths, nothing else")
    parser.add_argument("--steps", type=int, default=50, help="of --lengths")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser().error("its sizes need a GPU; on a CPU: --device cpu --tiny")
    if args.device == "cpu":
        console.note("on a CPU times say nothing about a link: gradients, bytes and the pool count")
    shape = TINY if args.tiny else LLAMA_7B
    rows: list[Row] = []
    result: dict = {"header": header(torch.device(args.device))}
    if args.lengths:
        result["lengths"] = found = random_lengths(shape, args)
        fine = found["ratio"] <= HELD_GOAL and not found["in_use_bytes"]
        console.print_table(
            ["steps", "host held MB", "most in use MB", "left MB", "held / in use", "goal"],
            [
                [
                    args.steps,
                    *(f"{found[x] / 1e6:.1f}" for x in ("held_bytes", "most_in_use_bytes")),
                    f"{found['in_use_bytes'] / 1e6:.1f}",
                    f"{found['ratio']:.3f}",
                    "met" if fine else f"missed: {HELD_GOAL}",
                ]
            ],
            title=result["header"],
        )
    else:
        for setup in setups(args.tiny):
            if args.only in setup.name:
                rows += Bench(setup, shape, args).run()
        report(rows, args)
        fine = all(row.goal.endswith("met") for row in rows if row.variant == PLANNED)
        result["rows"] = [asdict(row) for row in rows]
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if args.check and not fine else 0


if __name__ == "__main__":
    raise SystemExit(main())
